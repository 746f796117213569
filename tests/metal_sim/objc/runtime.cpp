// Objective-C runtime subset: loads the classes that clang emits for -fobjc-runtime=macosx and finds methods.
//
// Everything is resolved when the image is loaded: selectors are made unique, categories attached, and each class gets
// one flat table of all its methods. Nothing changes afterwards, so look-ups from any number of threads need no lock.
// One image only: the section symbols are hidden, each linked binary has its own runtime.
#include "runtime.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>

namespace objc {

struct MethodTable {
  std::unordered_map<Selector, Implementation> methods;
};

namespace {

struct Category {
  const char* name;
  Class* cls;
  MethodList *instance_methods, *class_methods;
};

// The linker makes these for every section whose name is an identifier.
#define OBJC_SECTION(type, name)                                                \
  extern "C" __attribute__((weak, visibility("hidden"))) type __start_##name[]; \
  extern "C" __attribute__((weak, visibility("hidden"))) type __stop_##name[]

OBJC_SECTION(Class*, objc_classlist);
OBJC_SECTION(Selector, objc_selrefs);
OBJC_SECTION(Category*, objc_catlist);

using SelectorTable = std::unordered_map<std::string_view, Selector>;

// Never destroyed: messages are sent until the very end of the process.
SelectorTable& selectors() {
  static auto* table = new SelectorTable;
  return *table;
}

Selector unique(Selector name) {
  return selectors().emplace(name, name).first->second;
}

void add_methods(MethodTable& table, const MethodList* list) {
  if (list == nullptr) return;
  // The low bits of the entry size are flags.
  const std::size_t stride = list->entry_size & ~3u;
  const auto* entry = reinterpret_cast<const char*>(list->methods);
  for (std::uint32_t i = 0; i < list->count; ++i, entry += stride) {
    const auto* method = reinterpret_cast<const Method*>(entry);
    table.methods[unique(method->name)] = method->implementation;
  }
}

using OwnMethods = std::unordered_map<const Class*, MethodTable>;

const MethodTable* flatten(Class* cls, const OwnMethods& own, std::unordered_map<const Class*, bool>& done) {
  if (done[cls]) return cls->methods;
  auto* table = new MethodTable;
  if (cls->superclass != nullptr) *table = *flatten(cls->superclass, own, done);
  if (auto found = own.find(cls); found != own.end()) {
    for (const auto& [selector, implementation] : found->second.methods) table->methods[selector] = implementation;
  }
  cls->methods = table;
  done[cls] = true;
  return table;
}

void check_layout(const Class& cls) {
  if (cls.superclass == nullptr || cls.data->instance_start >= cls.superclass->data->instance_size) return;
  std::fprintf(stderr, "objc: %s was compiled without the ivars of its superclass %s\n", cls.data->name,
               cls.superclass->data->name);
  std::abort();
}

// Before any C++ initialiser of the image, which may send messages.
__attribute__((constructor(101))) void load_image() {
  for (Selector* selector = __start_objc_selrefs; selector < __stop_objc_selrefs; ++selector) {
    *selector = unique(*selector);
  }
  OwnMethods own;
  for (Class** cls = __start_objc_classlist; cls < __stop_objc_classlist; ++cls) {
    check_layout(**cls);
    add_methods(own[*cls], (*cls)->data->methods);
    add_methods(own[(*cls)->isa], (*cls)->isa->data->methods);
  }
  for (Category** category = __start_objc_catlist; category < __stop_objc_catlist; ++category) {
    add_methods(own[(*category)->cls], (*category)->instance_methods);
    add_methods(own[(*category)->cls->isa], (*category)->class_methods);
  }
  std::unordered_map<const Class*, bool> done;
  for (Class** cls = __start_objc_classlist; cls < __stop_objc_classlist; ++cls) {
    flatten(*cls, own, done);
    flatten((*cls)->isa, own, done);
  }
}

// The last method that was looked for in vain; where a message's receiver is depends on how it was sent.
thread_local const Class* missing_class;
thread_local Selector missing_selector;

// Stands in for a missing method: it is jumped to, so the exception starts in the sender's frame.
[[noreturn]] void unrecognized_selector() {
  const bool is_metaclass = (missing_class->data->flags & kMetaclass) != 0;
  throw std::logic_error(std::string(is_metaclass ? "+[" : "-[") + missing_class->data->name + " " + missing_selector +
                         "]: unrecognized selector");
}

Implementation find_or_refuse(const Class* cls, Selector selector) noexcept {
  if (Implementation found = find_method(cls, selector)) return found;
  missing_class = cls;
  missing_selector = selector;
  return unrecognized_selector;
}

struct Super {
  Object* receiver;
  Class* current_class;
};

}  // namespace

Implementation find_method(const Class* cls, Selector selector) noexcept {
  const auto& methods = cls->methods->methods;
  auto found = methods.find(selector);
  return found == methods.end() ? nullptr : found->second;
}

bool inherits_from(const Class* cls, const Class* ancestor) noexcept {
  while (cls != nullptr && cls != ancestor) cls = cls->superclass;
  return cls != nullptr;
}

Selector find_selector(const char* name) noexcept {
  auto found = selectors().find(name);
  return found == selectors().end() ? name : found->second;
}

}  // namespace objc

extern "C" {

// Class structures name these two; their contents are never read.
void* _objc_empty_cache;
void* _objc_empty_vtable;

// Called by message_send.S.
objc::Implementation objc_lookup(const objc::Object* receiver, objc::Selector selector) noexcept {
  return objc::find_or_refuse(receiver->isa, selector);
}

objc::Implementation objc_lookup_super(const objc::Super* super, objc::Selector selector) noexcept {
  return objc::find_or_refuse(super->current_class->superclass, selector);
}

objc::Object* objc_opt_self(objc::Object* object) {
  return object;
}

objc::Object* objc_opt_class(objc::Object* object) {
  if (object == nullptr || objc::is_class(object)) return object;
  return reinterpret_cast<objc::Object*>(object->isa);
}

bool objc_opt_isKindOfClass(const objc::Object* object, const objc::Class* cls) {
  return object != nullptr && objc::inherits_from(object->isa, cls);
}

bool objc_opt_respondsToSelector(const objc::Object* object, objc::Selector selector) {
  return object != nullptr && objc::find_method(object->isa, selector) != nullptr;
}

}  // extern "C"
