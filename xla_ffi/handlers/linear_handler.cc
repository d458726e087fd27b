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
                      int64_t family) {
  std::shared_ptr<NativeRuntime> runtime = runtimes().get(runtime_id);
  if (runtime == nullptr) {
    return failure(std::string(op) + ": no runtime has id " + std::to_string(runtime_id) +
                   " (was it closed?)");
  }
  LinearCall call;
  std::optional<Family> kind = family_of(family);
  std::optional<WeightFormat> format = weight_format(w.element_type());
  const size_t rank = heads ? 3 : 2;
  if (!kind) {
    return failure(std::string(op) + ": family " + std::to_string(family) +
                   "; wanted 0 (vector) or 1 (matrix)");
  }
  if (!format || w.dimensions().size() != rank) {
    return failure(std::string(op) + ": weights are " + describe(w) +
                   "; wanted float8_e4m3fn, bfloat16 or float32 of " +
                   (heads ? "[G, N, K]" : "[N, K]"));
  }
  Dims dims = w.dimensions();
  const int64_t g = heads ? dims[0] : 1, n = dims[rank - 2], k = dims[rank - 1];
  if (n < 1 || k < 1 || g < 1) {
    return failure(std::string(op) + ": empty weights " + describe(w));
  }
  const int64_t blocks_n = (n + kScaleBlock - 1) / kScaleBlock;
  const int64_t blocks_k = (k + kScaleBlock - 1) / kScaleBlock;
  if (heads) {
    JAXMOE_RETURN_IF_ERROR(expect_activation(op, "x", x, {-1, g, k}, &call.x_type));
    call.m = x.dimensions()[0];
    JAXMOE_RETURN_IF_ERROR(expect_activation(op, "the result", *y, {call.m, g, n}, &call.y_type));
  } else {
    JAXMOE_RETURN_IF_ERROR(expect_activation(op, "x", x, {-1, k}, &call.x_type));
    call.m = x.dimensions()[0];
    JAXMOE_RETURN_IF_ERROR(expect_activation(op, "the result", *y, {call.m, n}, &call.y_type));
  }
  const size_t wanted_rest = *format == WeightFormat::kFp8Block ? 1 : 0;
  if (rest.size() != wanted_rest) {
    return failure(std::string(op) + ": weights " + describe(w) + " came with " +
                   std::to_string(rest.size()) + " scale arrays; wanted " +
                   std::to_string(wanted_rest));
  }
  if (wanted_rest == 1) {
    ffi::ErrorOr<ffi::AnyBuffer> scale = rest.get<ffi::AnyBuffer>(0);
    if (!scale.has_value()) return scale.error();
    if (heads) {
      JAXMOE_RETURN_IF_ERROR(
          expect(op, "scale_inv", *scale, ffi::DataType::F32, {g, blocks_n, blocks_k}));
    } else {
      JAXMOE_RETURN_IF_ERROR(
          expect(op, "scale_inv", *scale, ffi::DataType::F32, {blocks_n, blocks_k}));
    }
    call.weight.scale = static_cast<const float*>(scale->untyped_data());
    call.weight.scale_stride = blocks_k;
    call.scale_group_stride = blocks_n * blocks_k;
  }
  const int64_t element = *format == WeightFormat::kF32    ? 4
                          : *format == WeightFormat::kBf16 ? 2
                                                           : 1;
  call.family = *kind;
  call.weight.data = static_cast<const uint8_t*>(w.untyped_data());
  call.weight.n = n;
  call.weight.k = k;
  call.weight.row_stride_bytes = k * element;
  call.weight.format = *format;
  call.groups = g;
  call.weight_group_bytes = n * k * element;
  call.x = x.untyped_data();
  call.ldx = g * k;
  call.y = y->untyped_data();
  call.ldy = g * n;
  return to_error(linear(*runtime->cpu, call));
}

ffi::Error linear_impl(ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::RemainingArgs rest,
                       ffi::Result<ffi::AnyBuffer> y, int64_t runtime_id, int64_t family) {
  return run_linear("linear", false, x, w, rest, y, runtime_id, family);
}

ffi::Error head_linear_impl(ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::RemainingArgs rest,
                            ffi::Result<ffi::AnyBuffer> y, int64_t runtime_id, int64_t family) {
  return run_linear("head_linear", true, x, w, rest, y, runtime_id, family);
}

auto binding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("runtime_id")
      .Attr<int64_t>("family");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeLinear, linear_impl, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeHeadLinear, head_linear_impl, binding());

}  // namespace jaxmoe
