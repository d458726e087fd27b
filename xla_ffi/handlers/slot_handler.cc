// slot_acquire and slot_release: ON and OFF of a ring's slot inside a compiled program. Both pass
// their operands through, which orders them among the program's other operations.
#include "handlers/checks.h"
#include "handlers/handlers.h"
#include "handlers/registries.h"

namespace jaxmoe {
namespace {

ffi::Error call_ring(const char* op, Status (SlotRing::*method)(int, DeviceStream),
                     DeviceStream stream, int32_t device_ordinal, const ffi::RemainingArgs& args,
                     const ffi::RemainingRets& rets, int64_t ring_id, int64_t slot) {
  JAXMOE_RETURN_IF_ERROR(check_pass_through(op, args, 0, rets));
  std::shared_ptr<SlotRingGroup> group = slot_rings().get(ring_id);
  if (group == nullptr) {
    return failure(std::string(op) + ": no slot ring has id " + std::to_string(ring_id) +
                   " (was it closed?)");
  }
  SlotRing* ring = group->find(device_ordinal);
  if (ring == nullptr) {
    return failure(std::string(op) + ": slot ring " + std::to_string(ring_id) +
                   " has none for device " + std::to_string(device_ordinal));
  }
  if (ring->driver().is_host() != (stream == nullptr)) {
    return failure(std::string(op) + ": slot ring " + std::to_string(ring_id) +
                   " is of another platform than the program");
  }
  if (slot < 0 || slot >= ring->num_slots()) {
    return failure(std::string(op) + ": slot " + std::to_string(slot) + " of a ring of " +
                   std::to_string(ring->num_slots()));
  }
  const Status status = (ring->*method)(static_cast<int>(slot), stream);
  if (status.ok()) return ffi::Error::Success();
  return failure(std::string(op) + ": " + status.message());
}

ffi::Error acquire_impl(int32_t device, ffi::RemainingArgs args, ffi::RemainingRets rets,
                        int64_t ring_id, int64_t slot) {
  return call_ring("slot_acquire", &SlotRing::acquire, nullptr, device, args, rets, ring_id, slot);
}

ffi::Error release_impl(int32_t device, ffi::RemainingArgs args, ffi::RemainingRets rets,
                        int64_t ring_id, int64_t slot) {
  return call_ring("slot_release", &SlotRing::release, nullptr, device, args, rets, ring_id, slot);
}

ffi::Error cuda_acquire_impl(DeviceStream stream, int32_t device, ffi::RemainingArgs args,
                             ffi::RemainingRets rets, int64_t ring_id, int64_t slot) {
  return call_ring("slot_acquire", &SlotRing::acquire, stream, device, args, rets, ring_id, slot);
}

ffi::Error cuda_release_impl(DeviceStream stream, int32_t device, ffi::RemainingArgs args,
                             ffi::RemainingRets rets, int64_t ring_id, int64_t slot) {
  return call_ring("slot_release", &SlotRing::release, stream, device, args, rets, ring_id, slot);
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::DeviceOrdinal>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<int64_t>("ring_id")
      .Attr<int64_t>("slot");
}

// The stream is a pointer to us as to XLA; no CUDA type is needed.
auto cuda_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<DeviceStream>>()
      .Ctx<ffi::DeviceOrdinal>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<int64_t>("ring_id")
      .Attr<int64_t>("slot");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeSlotAcquire, acquire_impl, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeSlotRelease, release_impl, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeSlotAcquireCuda, cuda_acquire_impl, cuda_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeSlotReleaseCuda, cuda_release_impl, cuda_binding());

}  // namespace jaxmoe
