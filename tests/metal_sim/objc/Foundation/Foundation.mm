// NSObject, strings, errors and arrays, written under ARC like any client.
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#import <Foundation/Foundation.h>

#import "Foundation/private.h"

extern "C" {
id objc_alloc(Class cls) NS_RETURNS_RETAINED;
Class objc_opt_class(id object);
BOOL objc_opt_isKindOfClass(id object, Class cls);
BOOL objc_opt_respondsToSelector(id object, SEL selector);
void objc_dispose(id object) noexcept;
}

@implementation NSObject
+ (instancetype)alloc {
  return objc_alloc(self);
}
+ (instancetype)new {
  return [[self alloc] init];
}
+ (Class)class {
  return self;
}
- (instancetype)init {
  return self;
}
- (void)dealloc {
  objc_dispose(self);
}
- (id)copy {
  return [static_cast<id<NSCopying>>(self) copyWithZone:nil];
}
- (BOOL)isEqual:(id)object {
  return self == object;
}
- (NSUInteger)hash {
  return reinterpret_cast<NSUInteger>(self);
}
- (Class)class {
  return objc_opt_class(self);
}
- (BOOL)isKindOfClass:(Class)aClass {
  return objc_opt_isKindOfClass(self, aClass);
}
- (BOOL)respondsToSelector:(SEL)aSelector {
  return objc_opt_respondsToSelector(self, aSelector);
}
@end

// Strings -----------------------------------------------------------------------------------------------------------

@interface SimString : NSString
@end

@implementation SimString {
  std::string text_;
}
- (instancetype)initWithText:(std::string)text {
  text_ = std::move(text);
  return self;
}
- (const char*)UTF8String {
  return text_.c_str();
}
@end

/// The class of @"..." literals; its layout is the compiler's.
@interface NSConstantString : NSString
@end

@implementation NSConstantString {
  int flags_;
  const char* text_;
  long length_;
}
- (const char*)UTF8String {
  constexpr int kUtf16 = 0x10;
  if (flags_ & kUtf16) throw std::logic_error("NSConstantString: only ASCII literals are supported");
  return text_;
}
@end

__asm__(".globl __CFConstantStringClassReference\n"
        ".hidden __CFConstantStringClassReference\n"
        ".set __CFConstantStringClassReference, OBJC_CLASS_$_NSConstantString");

@implementation NSString
@dynamic UTF8String;  // each subclass has its own
+ (instancetype)stringWithUTF8String:(const char*)nullTerminatedCString {
  return to_nsstring(nullTerminatedCString);
}
// In UTF-16 units, as Apple counts: one for each UTF-8 sequence, two for those of four bytes.
- (NSUInteger)length {
  NSUInteger length = 0;
  for (const char* c = self.UTF8String; *c != 0; ++c) {
    const auto byte = static_cast<unsigned char>(*c);
    length += byte >= 0xF0 ? 2 : (byte & 0xC0) != 0x80 ? 1 : 0;
  }
  return length;
}
- (BOOL)isEqualToString:(NSString*)aString {
  return std::strcmp(self.UTF8String, aString.UTF8String) == 0;
}
- (BOOL)isEqual:(id)object {
  return [object isKindOfClass:[NSString class]] && [self isEqualToString:object];
}
- (NSUInteger)hash {
  return std::hash<std::string>{}(self.UTF8String);
}
- (id)copyWithZone:(NSZone*)zone {
  return self;
}
@end

NSString* to_nsstring(const std::string& text) {
  return [[SimString alloc] initWithText:text];
}

// Errors ------------------------------------------------------------------------------------------------------------

@implementation NSError
@synthesize domain = domain_;
@synthesize code = code_;
@synthesize localizedDescription = localizedDescription_;
- (instancetype)initWithDomain:(NSErrorDomain)domain code:(NSInteger)code description:(NSString*)description {
  domain_ = domain;
  code_ = code;
  localizedDescription_ = description;
  return self;
}
@end

NSError* make_error(NSErrorDomain domain, NSInteger code, const std::string& description) {
  return [[NSError alloc] initWithDomain:domain code:code description:to_nsstring(description)];
}

// Arrays ------------------------------------------------------------------------------------------------------------

@implementation NSArray {
  std::vector<id> objects_;
}
+ (instancetype)arrayWithObjects:(const id[])objects count:(NSUInteger)cnt {
  NSArray* array = [self new];
  array->objects_.assign(objects, objects + cnt);
  return array;
}
- (NSUInteger)count {
  return objects_.size();
}
- (id)objectAtIndex:(NSUInteger)index {
  return objects_.at(index);
}
- (id)objectAtIndexedSubscript:(NSUInteger)idx {
  return objects_.at(idx);
}
- (NSUInteger)countByEnumeratingWithState:(NSFastEnumerationState*)state
                                  objects:(id __unsafe_unretained[])buffer
                                    count:(NSUInteger)len {
  if (state->state != 0) return 0;
  static unsigned long never_mutated = 0;
  state->state = 1;
  state->mutationsPtr = &never_mutated;
  state->itemsPtr = reinterpret_cast<id __unsafe_unretained*>(objects_.data());
  return objects_.size();
}
@end

// Called by for-in loops over a collection that changed; arrays here do not change.
extern "C" void objc_enumerationMutation(id) {
  throw std::logic_error("NSArray: changed while enumerated");
}
