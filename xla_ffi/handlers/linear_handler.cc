#include "handlers/checks.h"
#include "handlers/handlers.h"
#include "handlers/registries.h"
#include "moe/linear.h"

namespace jaxmoe {
namespace {

// One map: x [T, K], w [N, K], y [T, N]. One per head (heads): x [T, G, K], w [G, N, K], y [T, G,
// N].
ffi::Error run_linear(const char* op, bool heads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                      ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y, int64_t runtime_id,
                      int64_t family, int64_t format_code) {
  std::shared_ptr<NativeRuntime> runtime = runtimes().get(runtime_id);
  if (runtime == nullptr) {
    return failure(std::string(op) + ": no runtime has id " + std::to_string(runtime_id) +
                   " (was it closed?)");
  }
  LinearCall call;
  std::optional<Family> kind = family_of(family);
  std::optional<WeightFormat> format = weight_format(format_code);
  const size_t rank = heads ? 3 : 2;
  if (!kind) {
    return failure(std::string(op) + ": family " + std::to_string(family) +
                   "; wanted 0 (vector) or 1 (matrix)");
  }
  if (!format) {
    return failure(std::string(op) + ": weight format " + std::to_string(format_code) +
                   "; wanted 0 to " + std::to_string(kNumFormats - 1));
  }
  const FormatInfo& info = format_info(*format);
  if (w.element_type() != data_type(*format) || w.dimensions().size() != rank) {
    return failure(std::string(op) + ": weights are " + describe(w) + "; wanted " +
                   type_name(data_type(*format)) + " of " + (heads ? "[G, N, K]" : "[N, K]") +
                   " for format " + info.name);
  }
  Dims dims = w.dimensions();
  const int64_t g = heads ? dims[0] : 1, n = dims[rank - 2];
  const int64_t k = info.bits == 4 ? 2 * dims[rank - 1] : dims[rank - 1];
  if (n < 1 || k < 1 || g < 1) {
    return failure(std::string(op) + ": empty weights " + describe(w));
  }
  if (!columns_suit(*format, k)) {
    return failure(std::string(op) + ": rows of " + std::to_string(k) + " weights of format " +
                   info.name + "; wanted a multiple of " + std::to_string(info.group_cols));
  }
  if (heads) {
    JAXMOE_RETURN_IF_ERROR(expect_activation(op, "x", x, {-1, g, k}, &call.x_type));
    call.m = x.dimensions()[0];
    JAXMOE_RETURN_IF_ERROR(expect_activation(op, "the result", *y, {call.m, g, n}, &call.y_type));
  } else {
    JAXMOE_RETURN_IF_ERROR(expect_activation(op, "x", x, {-1, k}, &call.x_type));
    call.m = x.dimensions()[0];
    JAXMOE_RETURN_IF_ERROR(expect_activation(op, "the result", *y, {call.m, n}, &call.y_type));
  }
  const size_t wanted_rest = info.scaled() ? 1 : 0;
  if (rest.size() != wanted_rest) {
    return failure(std::string(op) + ": weights " + describe(w) + " of format " + info.name +
                   " came with " + std::to_string(rest.size()) + " scale arrays; wanted " +
                   std::to_string(wanted_rest));
  }
  if (wanted_rest == 1) {
    ffi::ErrorOr<ffi::AnyBuffer> scale = rest.get<ffi::AnyBuffer>(0);
    if (!scale.has_value()) return scale.error();
    auto [rows, cols] = scale_dims(*format, n, k);
    const ffi::DataType type = data_type(info.scale_type);
    if (heads) {
      JAXMOE_RETURN_IF_ERROR(expect(op, "scale_inv", *scale, type, {g, rows, cols}));
    } else {
      JAXMOE_RETURN_IF_ERROR(expect(op, "scale_inv", *scale, type, {rows, cols}));
    }
    call.weight.scale = static_cast<const uint8_t*>(scale->untyped_data());
    call.weight.scale_stride = cols;
    call.scale_group_bytes = rows * cols * scale_bytes(info.scale_type);
  }
  const int64_t row_bytes = weight_row_bytes(*format, k);
  call.family = *kind;
  call.weight.data = static_cast<const uint8_t*>(w.untyped_data());
  call.weight.n = n;
  call.weight.k = k;
  call.weight.row_stride_bytes = row_bytes;
  call.weight.format = *format;
  call.groups = g;
  call.weight_group_bytes = n * row_bytes;
  call.x = x.untyped_data();
  call.ldx = g * k;
  call.y = y->untyped_data();
  call.ldy = g * n;
  return to_error(linear(*runtime->cpu, call));
}

ffi::Error linear_impl(ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::RemainingArgs rest,
                       ffi::Result<ffi::AnyBuffer> y, int64_t runtime_id, int64_t family,
                       int64_t format) {
  return run_linear("linear", false, x, w, rest, y, runtime_id, family, format);
}

ffi::Error head_linear_impl(ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::RemainingArgs rest,
                            ffi::Result<ffi::AnyBuffer> y, int64_t runtime_id, int64_t family,
                            int64_t format) {
  return run_linear("head_linear", true, x, w, rest, y, runtime_id, family, format);
}

auto binding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("runtime_id")
      .Attr<int64_t>("family")
      .Attr<int64_t>("format");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeLinear, linear_impl, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeHeadLinear, head_linear_impl, binding());

}  // namespace jaxmoe
