#include "attention/paged_attention.h"
#include "handlers/checks.h"
#include "handlers/handlers.h"
#include "handlers/registries.h"

namespace jaxmoe {
namespace {

// pages [P, Z, K, H], rows [T, K, H], slots [T]; the result is the pages' own buffer.
ffi::Error kv_write_impl(ffi::AnyBuffer pages, ffi::AnyBuffer rows, ffi::AnyBuffer slots,
                         ffi::Result<ffi::AnyBuffer> out) {
  constexpr const char* kOp = "kv_write";
  KvWriteCall call;
  JAXMOE_RETURN_IF_ERROR(
      expect_activation(kOp, "the cache", pages, {-1, -1, -1, -1}, &call.cache_type));
  Dims dims = pages.dimensions();
  JAXMOE_RETURN_IF_ERROR(expect_activation(kOp, "new", rows, {-1, dims[2], dims[3]}, &call.type));
  call.num_tokens = rows.dimensions()[0];
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "kv_slots", slots, ffi::DataType::S32, {call.num_tokens}));
  JAXMOE_RETURN_IF_ERROR(
      expect(kOp, "the result", *out, pages.element_type(), {dims[0], dims[1], dims[2], dims[3]}));
  if (out->untyped_data() != pages.untyped_data()) {
    return failure(
        "kv_write: the result has another buffer than the cache: alias it to its operand");
  }
  call.cache = pages.untyped_data();
  call.num_slots = dims[0] * dims[1];
  call.rows = rows.untyped_data();
  call.row_elements = dims[2] * dims[3];
  call.slots = static_cast<const int32_t*>(slots.untyped_data());
  return to_error(kv_write(call));
}

// q [T, N, H], keys [P, Z, K, H], token_rows [T], positions [T], block_tables [R, MP], values [P,
// Z, K, Hv] or none, with has_sinks sinks f32 [N]; out f32 [T, N, v_dim].
ffi::Error attention_impl(ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer token_rows,
                          ffi::AnyBuffer positions, ffi::AnyBuffer block_tables,
                          ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out,
                          int64_t runtime_id, int64_t family, float scale, int64_t window,
                          bool has_sinks) {
  constexpr const char* kOp = "paged_attention";
  std::shared_ptr<NativeRuntime> runtime = runtimes().get(runtime_id);
  if (runtime == nullptr) {
    return failure(std::string(kOp) + ": no runtime has id " + std::to_string(runtime_id) +
                   " (was it closed?)");
  }
  PagedAttentionCall call;
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
  JAXMOE_RETURN_IF_ERROR(
      expect_activation(kOp, "keys", keys, {-1, -1, -1, call.head_dim}, &call.cache_type));
  call.num_pages = keys.dimensions()[0];
  call.page_size = keys.dimensions()[1];
  call.num_kv_heads = keys.dimensions()[2];
  JAXMOE_RETURN_IF_ERROR(
      expect(kOp, "token_rows", token_rows, ffi::DataType::S32, {call.num_tokens}));
  JAXMOE_RETURN_IF_ERROR(
      expect(kOp, "positions", positions, ffi::DataType::S32, {call.num_tokens}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "block_tables", block_tables, ffi::DataType::S32, {-1, -1}));
  JAXMOE_RETURN_IF_ERROR(
      expect(kOp, "the result", *out, ffi::DataType::F32, {call.num_tokens, call.num_heads, -1}));
  call.v_dim = out->dimensions()[2];
  if (call.num_kv_heads < 1 || call.page_size < 1 || call.head_dim < 1 || call.v_dim < 1 ||
      call.num_heads % call.num_kv_heads != 0) {
    return failure(std::string(kOp) + ": q is " + describe(q) + " and keys are " + describe(keys) +
                   "; wanted a number of heads that is a multiple of the KV heads, and "
                   "no empty dimension");
  }
  if (window < 0) {
    return failure(std::string(kOp) + ": window " + std::to_string(window) +
                   "; wanted a number of positions, or 0 for all");
  }
  call.window = window;
  size_t num_values = rest.size();
  if (has_sinks) {
    if (num_values == 0) return failure(std::string(kOp) + ": has_sinks without an array of them");
    ffi::ErrorOr<ffi::AnyBuffer> sinks = rest.get<ffi::AnyBuffer>(--num_values);
    if (!sinks.has_value()) return sinks.error();
    JAXMOE_RETURN_IF_ERROR(expect(kOp, "sinks", *sinks, ffi::DataType::F32, {call.num_heads}));
    call.sinks = static_cast<const float*>(sinks->untyped_data());
  }
  if (num_values > 1) {
    return failure(std::string(kOp) + ": " + std::to_string(num_values) +
                   " value arrays; wanted one, or none (values are then the first "
                   "elements of the keys)");
  }
  if (num_values == 1) {
    ffi::ErrorOr<ffi::AnyBuffer> values = rest.get<ffi::AnyBuffer>(0);
    if (!values.has_value()) return values.error();
    JAXMOE_RETURN_IF_ERROR(expect(kOp, "values", *values, keys.element_type(),
                                  {call.num_pages, call.page_size, call.num_kv_heads, call.v_dim}));
    call.values = values->untyped_data();
  } else if (call.v_dim > call.head_dim) {
    return failure(std::string(kOp) + ": v_dim " + std::to_string(call.v_dim) +
                   " of values that are the first elements of keys with " +
                   std::to_string(call.head_dim));
  }
  call.q = q.untyped_data();
  call.scale = scale;
  call.keys = keys.untyped_data();
  call.token_rows = static_cast<const int32_t*>(token_rows.untyped_data());
  call.positions = static_cast<const int32_t*>(positions.untyped_data());
  call.block_tables = static_cast<const int32_t*>(block_tables.untyped_data());
  call.num_rows = block_tables.dimensions()[0];
  call.pages_per_row = block_tables.dimensions()[1];
  call.out = static_cast<float*>(out->untyped_data());
  return to_error(paged_attention(*runtime->cpu, call));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeKvWrite, kv_write_impl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoePagedAttention, attention_impl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("runtime_id")
                                  .Attr<int64_t>("family")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<bool>("has_sinks"));

}  // namespace jaxmoe
