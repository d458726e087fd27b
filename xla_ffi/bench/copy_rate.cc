#include "bench/copy_rate.h"

namespace jaxmoe {
namespace {

// Events 0 to repeats are recorded between the copies, all enqueued at once.
Status run(DeviceDriver& driver, DeviceStream stream, const std::vector<DeviceEvent>& events,
           void* device, void* host, size_t bytes, bool to_device, std::vector<double>* rates) {
  Status status = driver.event_record(events[0], stream);
  for (size_t i = 1; status.ok() && i < events.size(); ++i) {
    status = to_device ? driver.copy_to_device_async(device, host, bytes, stream)
                       : driver.copy_to_host_async(host, device, bytes, stream);
    if (status.ok()) status = driver.event_record(events[i], stream);
  }
  if (status.ok()) status = driver.event_synchronize(events.back());
  for (size_t i = 1; status.ok() && i < events.size(); ++i) {
    double seconds = 0;
    status = driver.event_elapsed(events[i - 1], events[i], &seconds);
    rates->push_back(static_cast<double>(bytes) / seconds);
  }
  return status;
}

}  // namespace

Status copy_rate(DeviceDriver& driver, void* device, void* host, size_t bytes, int repeats,
                 bool to_device, std::vector<double>* rates) {
  rates->clear();
  DeviceStream stream = nullptr;
  Status status = driver.stream_create(&stream);
  if (!status.ok()) return status;
  std::vector<DeviceEvent> events;
  while (status.ok() && events.size() <= static_cast<size_t>(repeats)) {
    DeviceEvent event = nullptr;
    status = driver.event_create(&event);
    if (status.ok()) events.push_back(event);
  }
  if (status.ok()) status = run(driver, stream, events, device, host, bytes, to_device, rates);
  const Status drained = driver.stream_synchronize(stream);
  for (DeviceEvent event : events) (void)driver.event_destroy(event);
  (void)driver.stream_destroy(stream);
  return status.ok() ? drained : status;
}

}  // namespace jaxmoe
