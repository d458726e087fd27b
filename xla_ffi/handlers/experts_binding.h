// What the experts' handlers of all platforms check and bind: operands, attributes, objects.
#ifndef JAXMOE_HANDLERS_EXPERTS_BINDING_H_
#define JAXMOE_HANDLERS_EXPERTS_BINDING_H_

#include <memory>

#include "handlers/checks.h"
#include "handlers/registries.h"
#include "moe/experts.h"

namespace jaxmoe {

// Kept for the length of a call, so that closing only takes their names away.
struct ExpertsObjects {
  std::shared_ptr<NativeRuntime> runtime;
  std::shared_ptr<HostStore> store;
};

// Which layer of what, as attributes say.
struct ExpertsAttributes {
  int64_t runtime_id = 0, store_id = 0, layer = 0, family = 0;
  float alpha = 0, limit = 0, up_offset = 0;
  bool has_biases = false;
};

Status find_runtime(const char* op, int64_t runtime_id, ExpertsObjects* objects);

// Checks everything but y, whose buffer only some of the operations have. The first two of `rest`
// are biases of gate and up, f32 [E, F], where the attributes say so.
Status bind_experts(const char* op, ffi::AnyBuffer x, ffi::AnyBuffer ids, ffi::AnyBuffer weights,
                    const ffi::RemainingArgs& rest, const ExpertsAttributes& attributes,
                    ExpertsObjects* objects, ExpertsCall* call);

// The same for x, ids and weights that lie one after the other in one S32 array: a device copies
// them to the host in one piece. How they were shaped is said by attributes.
struct PackedShape {
  int64_t num_tokens = 0, per_token = 0;
  bool x_is_bf16 = false;
};
Status bind_packed_experts(const char* op, ffi::AnyBuffer packed, const PackedShape& shape,
                           const ffi::RemainingArgs& rest, const ExpertsAttributes& attributes,
                           ExpertsObjects* objects, ExpertsCall* call);

}  // namespace jaxmoe

#endif  // JAXMOE_HANDLERS_EXPERTS_BINDING_H_
