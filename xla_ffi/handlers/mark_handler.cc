#include "handlers/checks.h"
#include "handlers/handlers.h"
#include "handlers/registries.h"

namespace jaxmoe {
namespace {

// Tells the tracer that the program has come to this point, when its operand is ready; the result
// is the operand's own buffer.
ffi::Error mark_impl(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y, int64_t runtime_id,
                     int64_t point) {
  std::shared_ptr<NativeRuntime> runtime = runtimes().get(runtime_id);
  if (runtime == nullptr) {
    return failure("mark: no runtime has id " + std::to_string(runtime_id) + " (was it closed?)");
  }
  if (x.untyped_data() != y->untyped_data()) {
    return failure("mark: the result has another buffer than the operand: alias it");
  }
  if (point < 0 || point > static_cast<int64_t>(ProgramPoint::kEnd)) {
    return failure("mark: point " + std::to_string(point) + "; wanted 0, 1 or 2");
  }
  runtime->cpu->tracer().mark(static_cast<ProgramPoint>(point));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeMark, mark_impl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("runtime_id")
                                  .Attr<int64_t>("point"));

}  // namespace jaxmoe
