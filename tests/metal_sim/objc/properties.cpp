// Accessors of synthesized object properties: what clang calls for (atomic) and (copy).
#include <mutex>

#include "runtime.h"

using objc::Object;
using objc::Selector;

namespace {

Object** slot_of(Object* self, std::ptrdiff_t offset) {
  return reinterpret_cast<Object**>(reinterpret_cast<char*>(self) + offset);
}

std::mutex& lock_of(const void* slot) {
  static std::mutex locks[16];
  return locks[(reinterpret_cast<std::uintptr_t>(slot) >> 4) % 16];
}

Object* copy(Object* object) {
  static const Selector selector = objc::find_selector("copy");
  return objc_msgSend(object, selector);
}

// `value` comes with a reference that the property takes over.
void set_property(Object** slot, Object* value, bool is_atomic) {
  std::unique_lock lock(lock_of(slot), std::defer_lock);
  if (is_atomic) lock.lock();
  Object* before = *slot;
  *slot = value;
  if (is_atomic) lock.unlock();
  objc_release(before);
}

}  // namespace

extern "C" {

Object* objc_getProperty(Object* self, Selector, std::ptrdiff_t offset, bool is_atomic) {
  Object** slot = slot_of(self, offset);
  if (!is_atomic) return *slot;
  std::lock_guard lock(lock_of(slot));
  return objc_autorelease(objc_retain(*slot));
}

void objc_setProperty_atomic(Object* self, Selector, Object* value, std::ptrdiff_t offset) {
  set_property(slot_of(self, offset), objc_retain(value), true);
}

void objc_setProperty_nonatomic(Object* self, Selector, Object* value, std::ptrdiff_t offset) {
  set_property(slot_of(self, offset), objc_retain(value), false);
}

void objc_setProperty_atomic_copy(Object* self, Selector, Object* value, std::ptrdiff_t offset) {
  set_property(slot_of(self, offset), copy(value), true);
}

void objc_setProperty_nonatomic_copy(Object* self, Selector, Object* value, std::ptrdiff_t offset) {
  set_property(slot_of(self, offset), copy(value), false);
}

}  // extern "C"
