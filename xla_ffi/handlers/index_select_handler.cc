#include "attention/index_select.h"
#include "handlers/checks.h"
#include "handlers/handlers.h"
#include "handlers/registries.h"

namespace jaxmoe {
namespace {

// q [T, N, H], head_weights f32 [T, N], keys [P, Z, 1, H], token_rows [T], positions [T],
// block_tables [R, MP]; out s32 [T, top_k].
ffi::Error index_select_impl(ffi::AnyBuffer q, ffi::AnyBuffer head_weights, ffi::AnyBuffer keys,
                             ffi::AnyBuffer token_rows, ffi::AnyBuffer positions,
                             ffi::AnyBuffer block_tables, ffi::Result<ffi::AnyBuffer> out,
                             int64_t runtime_id, int64_t family) {
  constexpr const char* kOp = "index_select";
  constexpr ffi::DataType kS32 = ffi::DataType::S32;
  std::shared_ptr<NativeRuntime> runtime = runtimes().get(runtime_id);
  if (runtime == nullptr) {
    return failure(std::string(kOp) + ": no runtime has id " + std::to_string(runtime_id) +
                   " (was it closed?)");
  }
  IndexSelectCall call;
  std::optional<Family> kind = family_of(family);
  if (!kind) {
    return failure(std::string(kOp) + ": family " + std::to_string(family) +
                   "; wanted 0 (vector) or 1 (matrix)");
  }
  call.family = *kind;
  JAXMOE_RETURN_IF_ERROR(expect_activation(kOp, "q", q, {-1, -1, -1}, &call.q_type));
  call.num_tokens = q.dimensions()[0];
  call.num_heads = q.dimensions()[1];
  call.head_dim = q.dimensions()[2];
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "head_weights", head_weights, ffi::DataType::F32,
                                {call.num_tokens, call.num_heads}));
  JAXMOE_RETURN_IF_ERROR(
      expect_activation(kOp, "keys", keys, {-1, -1, 1, call.head_dim}, &call.cache_type));
  call.num_pages = keys.dimensions()[0];
  call.page_size = keys.dimensions()[1];
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "token_rows", token_rows, kS32, {call.num_tokens}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "positions", positions, kS32, {call.num_tokens}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "block_tables", block_tables, kS32, {-1, -1}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "the result", *out, kS32, {call.num_tokens, -1}));
  call.top_k = out->dimensions()[1];
  if (call.num_heads < 1 || call.head_dim < 1 || call.page_size < 1 || call.top_k < 1) {
    return failure(std::string(kOp) + ": q is " + describe(q) + ", keys are " + describe(keys) +
                   " and the result is " + describe(*out) + "; wanted no empty dimension");
  }
  call.q = q.untyped_data();
  call.head_weights = static_cast<const float*>(head_weights.untyped_data());
  call.keys = keys.untyped_data();
  call.token_rows = static_cast<const int32_t*>(token_rows.untyped_data());
  call.positions = static_cast<const int32_t*>(positions.untyped_data());
  call.block_tables = static_cast<const int32_t*>(block_tables.untyped_data());
  call.num_rows = block_tables.dimensions()[0];
  call.pages_per_row = block_tables.dimensions()[1];
  call.out = static_cast<int32_t*>(out->untyped_data());
  Status status = index_select(*runtime->cpu, call);
  return status.ok() ? ffi::Error::Success() : failure(std::string(kOp) + ": " + status.message());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeIndexSelect, index_select_impl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("runtime_id")
                                  .Attr<int64_t>("family"));

}  // namespace jaxmoe
