// What the runtime offers the simulated frameworks, beside the entry points that compiled Objective-C code calls.
#pragma once

#include <cstddef>
#include <cstdint>

namespace objc {

using Implementation = void (*)();
/// A selector: the address of its unique name.
using Selector = const char*;

struct MethodTable;

// The layouts below are the compiler's (Apple's modern ABI, as in objc4's objc-runtime-new.h).

struct Method {
  Selector name;
  const char* types;
  Implementation implementation;
};

struct MethodList {
  std::uint32_t entry_size, count;
  Method methods[1];
};

enum ClassFlags : std::uint32_t { kMetaclass = 1 };

struct ClassData {
  std::uint32_t flags, instance_start, instance_size, reserved;
  const void* ivar_layout;
  const char* name;
  MethodList* methods;
  const void *protocols, *ivars, *weak_ivar_layout, *properties;
};

struct Class {
  Class* isa;
  Class* superclass;
  const MethodTable* methods;  ///< Apple's cache slot: every method the class answers to, inherited ones included
  const void* vtable;
  const ClassData* data;
};

struct Object {
  Class* isa;
};

/// Null where the class has no such method.
Implementation find_method(const Class* cls, Selector selector) noexcept;
/// `cls` itself, or a superclass of it, is `ancestor`.
bool inherits_from(const Class* cls, const Class* ancestor) noexcept;
inline bool is_class(const Object* object) noexcept {
  return (object->isa->data->flags & kMetaclass) != 0;
}

/// The unique selector of a name that the image uses; a name it never uses is returned unchanged.
Selector find_selector(const char* name) noexcept;

}  // namespace objc

extern "C" {
objc::Object* objc_msgSend(objc::Object* receiver, objc::Selector selector, ...);
objc::Object* objc_retain(objc::Object* object);
void objc_release(objc::Object* object);
objc::Object* objc_autorelease(objc::Object* object);

/// The object, or null where it is already being deallocated. For caches that do not keep their objects alive.
objc::Object* objc_try_retain(objc::Object* object) noexcept;
/// Destroys C++ and strong ivars and frees the memory; NSObject's -dealloc.
void objc_dispose(objc::Object* object) noexcept;
/// Objective-C objects alive; constant strings and classes are not counted.
__attribute__((visibility("default"))) long metal_sim_live_objects(void);
}
