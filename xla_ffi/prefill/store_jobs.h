// Jobs of a slot ring that bring routed experts out of the host store.
//
// A slot for X experts has the buffers gate [X, F, row bytes], up [X, F, row bytes] and down [X, D,
// row bytes], and where the layer's format has scales three more with theirs, [X, ...] as the store
// has them. In the slot everything lies dense and in order, however the store splits it over NUMA
// nodes.
#ifndef JAXMOE_PREFILL_STORE_JOBS_H_
#define JAXMOE_PREFILL_STORE_JOBS_H_

#include <memory>
#include <vector>

#include "prefill/slot_ring.h"
#include "runtime/host_store.h"
#include "runtime/status.h"

namespace jaxmoe {

// Experts first_expert to first_expert + num_experts - 1 of a layer become the first ones of a
// slot.
struct ExpertGroup {
  int slot = 0;
  int layer = 0;
  int first_expert = 0;
  int num_experts = 0;
};

// A copy of consecutive bytes, in pieces where page-locked parts meet. lock: nullptr for none.
void append_cut(int buffer, size_t dst, const uint8_t* src, size_t bytes, const PageLock* lock,
                std::vector<SlotCopy>* copies);

// Copies that are neighbours in the store and in the slot become one; many small ones at equal
// distances (scales, mostly) become one of rows; none crosses a border of page-locked parts.
// Fails where an expert of a group was not loaded.
Status append_store_jobs(const std::shared_ptr<HostStore>& store,
                         const std::vector<ExpertGroup>& groups, SlotJobs* jobs);

}  // namespace jaxmoe

#endif  // JAXMOE_PREFILL_STORE_JOBS_H_
