#pragma once

// What the experts' operations take, the same on every platform: buffers and attributes, in the
// order of the handlers' parameters. `binding` begins with what the platform adds.

#include "xla/ffi/api/ffi.h"

namespace jaxmoe {

template <class Binding>
auto bind_which_experts(Binding&& binding) {
  return std::move(binding)
      .template Attr<int64_t>("runtime_id")
      .template Attr<int64_t>("store_id")
      .template Attr<int64_t>("layer")
      .template Attr<int64_t>("family")
      .template Attr<float>("alpha")
      .template Attr<float>("limit")
      .template Attr<float>("up_offset");
}

// x, ids and weights, then biases.
template <class Binding>
auto bind_experts(Binding&& binding) {
  return bind_which_experts(std::move(binding)
                                .template Arg<xla::ffi::AnyBuffer>()
                                .template Arg<xla::ffi::AnyBuffer>()
                                .template Arg<xla::ffi::AnyBuffer>()
                                .RemainingArgs()
                                .template Ret<xla::ffi::AnyBuffer>());
}

// As bind_experts, then arrays that are passed through.
template <class Binding>
auto bind_submit(Binding&& binding) {
  return bind_which_experts(std::move(binding)
                                .template Arg<xla::ffi::AnyBuffer>()
                                .template Arg<xla::ffi::AnyBuffer>()
                                .template Arg<xla::ffi::AnyBuffer>()
                                .RemainingArgs()
                                .template Ret<xla::ffi::AnyBuffer>()
                                .RemainingRets())
      .template Attr<bool>("has_biases")
      .template Attr<int64_t>("slot");
}

// One packed buffer in the place of three.
template <class Binding>
auto bind_submit_packed(Binding&& binding) {
  return bind_which_experts(std::move(binding)
                                .template Arg<xla::ffi::AnyBuffer>()
                                .RemainingArgs()
                                .template Ret<xla::ffi::AnyBuffer>()
                                .RemainingRets())
      .template Attr<bool>("has_biases")
      .template Attr<int64_t>("slot")
      .template Attr<int64_t>("num_tokens")
      .template Attr<int64_t>("per_token")
      .template Attr<bool>("x_is_bf16");
}

template <class Binding>
auto bind_wait(Binding&& binding) {
  return std::move(binding)
      .template Arg<xla::ffi::AnyBuffer>()
      .RemainingArgs()
      .template Ret<xla::ffi::AnyBuffer>()
      .RemainingRets()
      .template Attr<int64_t>("runtime_id")
      .template Attr<int64_t>("slot");
}

}  // namespace jaxmoe
