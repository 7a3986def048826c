// Intrusive reference counting for the objects behind the C handles.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>

namespace kvlink {

class RefCounted {
 public:
  RefCounted() = default;
  RefCounted(const RefCounted &) = delete;
  RefCounted &operator=(const RefCounted &) = delete;

  void ref() const noexcept { count_.fetch_add(1, std::memory_order_relaxed); }
  void unref() const noexcept {
    if (count_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

 protected:
  virtual ~RefCounted() = default;

 private:
  mutable std::atomic<uint32_t> count_{1};
};

// Owns one reference.
template <typename T>
class Ref {
 public:
  Ref() = default;
  static Ref adopt(T *object) noexcept { return Ref(object); }
  static Ref share(T *object) noexcept {
    if (object != nullptr) object->ref();
    return Ref(object);
  }
  Ref(const Ref &other) noexcept : object_(other.object_) {
    if (object_ != nullptr) object_->ref();
  }
  Ref(Ref &&other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref &operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() {
    if (object_ != nullptr) object_->unref();
  }
  T *get() const noexcept { return object_; }
  T *release() noexcept { return std::exchange(object_, nullptr); }
  T *operator->() const noexcept { return object_; }
  T &operator*() const noexcept { return *object_; }
  explicit operator bool() const noexcept { return object_ != nullptr; }

 private:
  explicit Ref(T *object) noexcept : object_(object) {}
  T *object_ = nullptr;
};

// A doubly linked list through a member of its elements, so that linking never allocates. Each list owns a reference.
template <typename T>
struct ListHook {
  T *prev = nullptr;
  T *next = nullptr;
  bool linked = false;
};

template <typename T, ListHook<T> T::*Hook>
class IntrusiveList {
 public:
  IntrusiveList() = default;
  IntrusiveList(const IntrusiveList &) = delete;
  IntrusiveList &operator=(const IntrusiveList &) = delete;

  T *front() const noexcept { return head_; }
  bool empty() const noexcept { return head_ == nullptr; }
  static T *next(T *element) noexcept { return (element->*Hook).next; }
  static bool contains(const T *element) noexcept { return (element->*Hook).linked; }

  void push_back(T *element) noexcept { insert(element, tail_, nullptr); }
  void push_front(T *element) noexcept { insert(element, nullptr, head_); }

  // Unlinks; the list's reference passes to the caller.
  Ref<T> remove(T *element) noexcept {
    ListHook<T> &hook = element->*Hook;
    (hook.prev != nullptr ? (hook.prev->*Hook).next : head_) = hook.next;
    (hook.next != nullptr ? (hook.next->*Hook).prev : tail_) = hook.prev;
    hook = ListHook<T>{};
    return Ref<T>::adopt(element);
  }

 private:
  void insert(T *element, T *prev, T *next) noexcept {
    element->ref();
    ListHook<T> &hook = element->*Hook;
    hook.prev = prev;
    hook.next = next;
    hook.linked = true;
    (prev != nullptr ? (prev->*Hook).next : head_) = element;
    (next != nullptr ? (next->*Hook).prev : tail_) = element;
  }

  T *head_ = nullptr;
  T *tail_ = nullptr;
};

}  // namespace kvlink
