// Small integer names for long-lived native objects, so that compiled programs can refer to them by
// attribute.
//
// The lowest free id is given out: a process that creates its objects in the same order gets the
// same ids every time, and the persistent compile cache hits. Whoever uses an object holds a
// shared_ptr meanwhile; closing only takes the name away.
#ifndef JAXMOE_RUNTIME_REGISTRY_H_
#define JAXMOE_RUNTIME_REGISTRY_H_

#include <cstdint>
#include <memory>
#include <mutex>

namespace jaxmoe {

template <typename T>
class Registry {
 public:
  static constexpr int kCapacity = 64;

  // -1 when the table is full.
  int add(std::shared_ptr<T> object) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int id = 0; id < kCapacity; ++id) {
      if (objects_[id] == nullptr) {
        objects_[id] = std::move(object);
        return id;
      }
    }
    return -1;
  }
  // nullptr for an id that is not in use.
  std::shared_ptr<T> get(int64_t id) const {
    if (id < 0 || id >= kCapacity) return nullptr;
    std::lock_guard<std::mutex> lock(mutex_);
    return objects_[id];
  }
  // Takes the name away from `object`; another that got the id since keeps it.
  void remove(int64_t id, const T* object) {
    std::shared_ptr<T> last;  // destroyed after the lock is gone
    if (id < 0 || id >= kCapacity) return;
    std::lock_guard<std::mutex> lock(mutex_);
    if (objects_[id].get() == object) last.swap(objects_[id]);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<T> objects_[kCapacity];
};

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_REGISTRY_H_
