// What every handler does first: read element types and shapes of its buffers, and say what is
// wrong with them.
#ifndef JAXMOE_HANDLERS_CHECKS_H_
#define JAXMOE_HANDLERS_CHECKS_H_

#include <initializer_list>
#include <optional>
#include <string>

#include "kernels/formats.h"
#include "kernels/kernels.h"
#include "runtime/status.h"
#include "xla/ffi/api/ffi.h"

namespace jaxmoe {

namespace ffi = xla::ffi;

using Dims = ffi::AnyBuffer::Dimensions;

std::string type_name(ffi::DataType type);
std::string describe(const ffi::AnyBuffer& buffer);  // "bf16[4, 128]"
std::string describe_shape(std::initializer_list<int64_t> dims);

std::optional<ActivationType> activation_type(ffi::DataType type);
std::optional<WeightFormat> weight_format(int64_t value);
ffi::DataType data_type(WeightFormat format);  // of weights; two of four bits are a U8
ffi::DataType data_type(ScaleType type);       // of scales; not for kNone
std::optional<Family> family_of(int64_t value);

// An error unless the buffer has this element type and these dimensions (-1: any).
Status expect(const char* op, const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
              std::initializer_list<int64_t> dims);
// As expect, for a buffer of bfloat16 or float32.
Status expect_activation(const char* op, const char* name, const ffi::AnyBuffer& buffer,
                         std::initializer_list<int64_t> dims, ActivationType* type);

// Some operations carry arrays through unchanged, which orders what uses them before and after: an
// error unless the operands from `first` on are the results' own buffers.
Status check_pass_through(const char* op, const ffi::RemainingArgs& args, size_t first,
                          const ffi::RemainingRets& rets);

inline ffi::Error failure(const std::string& message) {
  return ffi::Error::InvalidArgument(message);
}

inline ffi::Error to_error(const Status& status) {
  return status.ok() ? ffi::Error::Success() : failure(status.message());
}

}  // namespace jaxmoe

#define JAXMOE_RETURN_IF_ERROR(expression)                                \
  if (::jaxmoe::Status jaxmoe_status = (expression); !jaxmoe_status.ok()) \
  return ::jaxmoe::to_error(jaxmoe_status)

#endif  // JAXMOE_HANDLERS_CHECKS_H_
