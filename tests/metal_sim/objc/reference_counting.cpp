// Reference counting: what ARC code calls. Every object has its count in a header in front of it.
//
// Autorelease pools are per thread; objects autoreleased outside any pool go when their thread ends.
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "runtime.h"

extern "C" {
extern objc::Class NSConstantStringClass __asm__("OBJC_CLASS_$_NSConstantString") __attribute__((visibility("hidden")));
}

namespace objc {
namespace {

struct alignas(16) Header {
  std::atomic<long> references;
};

// Above any real count: an object in -dealloc may be retained and released without being deallocated again.
constexpr long kDeallocating = 1L << 62;

std::atomic<long> live_objects{0};

Header* header(Object* object) {
  return reinterpret_cast<Header*>(object) - 1;
}

bool is_counted(Object* object) {
  return object != nullptr && object->isa != &NSConstantStringClass && !is_class(object);
}

template <class Function>
Function method(const Class* cls, Selector selector) {
  return reinterpret_cast<Function>(find_method(cls, selector));
}

// Base classes first.
void construct_ivars(Object* object, const Class* cls) {
  static const Selector construct = find_selector(".cxx_construct");
  if (cls == nullptr) return;
  construct_ivars(object, cls->superclass);
  using Construct = Object* (*)(Object*, Selector);
  auto own = method<Construct>(cls, construct);
  // Tables are flat: an inherited entry is the superclass's and has run already.
  if (own != nullptr && (cls->superclass == nullptr || own != method<Construct>(cls->superclass, construct))) {
    own(object, construct);
  }
}

void destroy_ivars(Object* object) {
  static const Selector destruct = find_selector(".cxx_destruct");
  using Destruct = void (*)(Object*, Selector);
  for (const Class* cls = object->isa; cls != nullptr; cls = cls->superclass) {
    auto own = method<Destruct>(cls, destruct);
    if (own != nullptr && (cls->superclass == nullptr || own != method<Destruct>(cls->superclass, destruct))) {
      own(object, destruct);
    }
  }
}

Object* create(Class* cls) {
  const std::size_t size = sizeof(Header) + cls->data->instance_size;
  void* memory = std::calloc(1, size);
  if (memory == nullptr) throw std::bad_alloc();
  auto* object = reinterpret_cast<Object*>(new (memory) Header{{1}} + 1);
  object->isa = cls;
  construct_ivars(object, cls);
  live_objects.fetch_add(1, std::memory_order_relaxed);
  return object;
}

void dealloc(Object* object) {
  static const Selector selector = find_selector("dealloc");
  header(object)->references.store(kDeallocating, std::memory_order_relaxed);
  method<void (*)(Object*, Selector)>(object->isa, selector)(object, selector);
}

class Pool {
 public:
  ~Pool() { drain(0); }
  void add(Object* object) {
    objects_.push_back(object);
    returned_ = nullptr;
  }
  void add_returned(Object* object) {
    objects_.push_back(object);
    returned_ = object;
  }
  /// Takes back the object that was added last, if a method has just returned it.
  bool take_returned(Object* object) {
    if (returned_ == nullptr || returned_ != object) return false;
    objects_.pop_back();
    returned_ = nullptr;
    return true;
  }
  std::size_t size() const { return objects_.size(); }

  // A release may autorelease more, which is drained as well.
  void drain(std::size_t size) {
    returned_ = nullptr;
    while (objects_.size() > size) {
      Object* last = objects_.back();
      objects_.pop_back();
      objc_release(last);
    }
  }

 private:
  std::vector<Object*> objects_;
  Object* returned_ = nullptr;
};

thread_local Pool pool;

}  // namespace
}  // namespace objc

using objc::Object;
using objc::Selector;

extern "C" {

long metal_sim_live_objects(void) {
  return objc::live_objects.load(std::memory_order_relaxed);
}

Object* objc_alloc(objc::Class* cls) {
  return cls == nullptr ? nullptr : objc::create(cls);
}

Object* objc_alloc_init(objc::Class* cls) {
  static const Selector init = objc::find_selector("init");
  return cls == nullptr ? nullptr : objc_msgSend(objc::create(cls), init);
}

Object* objc_opt_new(objc::Class* cls) {
  return objc_alloc_init(cls);
}

void objc_dispose(Object* object) noexcept {
  objc::destroy_ivars(object);
  std::free(objc::header(object));
  objc::live_objects.fetch_sub(1, std::memory_order_relaxed);
}

Object* objc_retain(Object* object) {
  if (objc::is_counted(object)) objc::header(object)->references.fetch_add(1, std::memory_order_relaxed);
  return object;
}

Object* objc_try_retain(Object* object) noexcept {
  if (!objc::is_counted(object)) return object;
  auto& references = objc::header(object)->references;
  long count = references.load(std::memory_order_relaxed);
  while (count > 0 && count < objc::kDeallocating / 2) {
    if (references.compare_exchange_weak(count, count + 1)) return object;
  }
  return nullptr;
}

void objc_release(Object* object) {
  if (!objc::is_counted(object)) return;
  if (objc::header(object)->references.fetch_sub(1, std::memory_order_acq_rel) == 1) objc::dealloc(object);
}

Object* objc_autorelease(Object* object) {
  if (objc::is_counted(object)) objc::pool.add(object);
  return object;
}

Object* objc_retainAutorelease(Object* object) {
  return objc_autorelease(objc_retain(object));
}

// A method returns an object through one of the first two, and its caller takes it over through one of the others right
// afterwards. The reference then leaves the pool again, so that the object lives no longer than its holders.
Object* objc_autoreleaseReturnValue(Object* object) {
  if (objc::is_counted(object)) objc::pool.add_returned(object);
  return object;
}
Object* objc_retainAutoreleaseReturnValue(Object* object) {
  return objc_autoreleaseReturnValue(objc_retain(object));
}
Object* objc_retainAutoreleasedReturnValue(Object* object) {
  return objc::pool.take_returned(object) ? object : objc_retain(object);
}
Object* objc_claimAutoreleasedReturnValue(Object* object) {
  return objc_retainAutoreleasedReturnValue(object);
}
Object* objc_unsafeClaimAutoreleasedReturnValue(Object* object) {
  if (objc::pool.take_returned(object)) objc_release(object);
  return object;
}

void* objc_autoreleasePoolPush() {
  return reinterpret_cast<void*>(objc::pool.size());
}
void objc_autoreleasePoolPop(void* size) {
  objc::pool.drain(reinterpret_cast<std::size_t>(size));
}

void objc_storeStrong(Object** location, Object* value) {
  Object* before = *location;
  if (before == value) return;
  *location = objc_retain(value);
  objc_release(before);
}

}  // extern "C"
