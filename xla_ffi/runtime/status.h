// Outcome of an operation that can fail for a reason the caller should read. No exceptions cross
// the pools.
#ifndef JAXMOE_RUNTIME_STATUS_H_
#define JAXMOE_RUNTIME_STATUS_H_

#include <string>
#include <utility>

namespace jaxmoe {

class [[nodiscard]] Status {
 public:
  Status() = default;
  static Status error(std::string message) {
    Status status;
    status.ok_ = false;
    status.message_ = std::move(message);
    return status;
  }
  bool ok() const { return ok_; }
  const std::string& message() const { return message_; }

 private:
  bool ok_ = true;
  std::string message_;
};

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_STATUS_H_
