#include "handlers/checks.h"

namespace jaxmoe {
namespace {

template <typename Range>
std::string format_dims(const Range& dims) {
  std::string text = "[";
  for (int64_t dim : dims) {
    if (text.size() > 1) text += ", ";
    text += dim < 0 ? std::string("*") : std::to_string(dim);
  }
  return text + "]";
}

bool matches(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> dims) {
  Dims have = buffer.dimensions();
  if (have.size() != dims.size()) return false;
  size_t i = 0;
  for (int64_t want : dims) {
    if (want >= 0 && have[i] != want) return false;
    ++i;
  }
  return true;
}

Status mismatch(const char* op, const char* name, const ffi::AnyBuffer& buffer,
                const std::string& wanted) {
  return Status::error(std::string(op) + ": " + name + " is " + describe(buffer) + "; wanted " +
                       wanted);
}

}  // namespace

std::string type_name(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::F8E4M3FN:
      return "float8_e4m3fn";
    case ffi::DataType::U8:
      return "uint8";
    case ffi::DataType::U32:
      return "uint32";
    case ffi::DataType::S32:
      return "int32";
    default:
      return "element type " + std::to_string(static_cast<int>(type));
  }
}

std::string describe(const ffi::AnyBuffer& buffer) {
  return type_name(buffer.element_type()) + format_dims(buffer.dimensions());
}

std::string describe_shape(std::initializer_list<int64_t> dims) { return format_dims(dims); }

std::optional<ActivationType> activation_type(ffi::DataType type) {
  if (type == ffi::DataType::F32) return ActivationType::kF32;
  if (type == ffi::DataType::BF16) return ActivationType::kBf16;
  return std::nullopt;
}

std::optional<WeightFormat> weight_format(int64_t value) {
  if (value < 0 || value >= kNumFormats) return std::nullopt;
  return static_cast<WeightFormat>(value);
}

ffi::DataType data_type(WeightFormat format) {
  const int bits = format_info(format).bits;
  return bits == 32   ? ffi::DataType::F32
         : bits == 16 ? ffi::DataType::BF16
         : bits == 8  ? ffi::DataType::F8E4M3FN
                      : ffi::DataType::U8;
}

ffi::DataType data_type(ScaleType type) {
  return type == ScaleType::kF32       ? ffi::DataType::F32
         : type == ScaleType::kBf16    ? ffi::DataType::BF16
         : type == ScaleType::kF32Zero ? ffi::DataType::U32
                                       : ffi::DataType::U8;
}

std::optional<Family> family_of(int64_t value) {
  if (value == 0) return Family::kVector;
  if (value == 1) return Family::kMatrix;
  return std::nullopt;
}

Status expect(const char* op, const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
              std::initializer_list<int64_t> dims) {
  if (buffer.element_type() == type && matches(buffer, dims)) return {};
  return mismatch(op, name, buffer, type_name(type) + format_dims(dims));
}

Status expect_activation(const char* op, const char* name, const ffi::AnyBuffer& buffer,
                         std::initializer_list<int64_t> dims, ActivationType* type) {
  std::optional<ActivationType> found = activation_type(buffer.element_type());
  if (!found || !matches(buffer, dims)) {
    return mismatch(op, name, buffer, "bfloat16 or float32" + format_dims(dims));
  }
  *type = *found;
  return {};
}

Status check_pass_through(const char* op, const ffi::RemainingArgs& args, size_t first,
                          const ffi::RemainingRets& rets) {
  if (args.size() != first + rets.size()) {
    return Status::error(std::string(op) + ": " + std::to_string(args.size() - first) +
                         " arrays passed in, " + std::to_string(rets.size()) + " passed through");
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    ffi::ErrorOr<ffi::AnyBuffer> in = args.get<ffi::AnyBuffer>(first + i);
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> out = rets.get<ffi::AnyBuffer>(i);
    if (!in.has_value()) return Status::error(in.error().message());
    if (!out.has_value()) return Status::error(out.error().message());
    if (in->untyped_data() != (*out)->untyped_data()) {
      return Status::error(std::string(op) + ": passed-through array " + std::to_string(i) +
                           " has another buffer as result: alias it to its operand");
    }
  }
  return {};
}

}  // namespace jaxmoe
