// Libraries, functions with their constants, and pipelines.
#import "Foundation/private.h"
#import "simulated.h"

using metal_sim::ConstantType;
using metal_sim::ConstantValue;
using metal_sim::require;

namespace {

struct TypeInfo {
  MTLDataType data_type;
  ConstantType type;
  std::size_t size;
  const char* name;
};

constexpr TypeInfo kTypes[] = {
    {MTLDataTypeBool, ConstantType::kBool, 1, "bool"}, {MTLDataTypeInt, ConstantType::kInt, 4, "int"},
    {MTLDataTypeUInt, ConstantType::kUint, 4, "uint"}, {MTLDataTypeUShort, ConstantType::kUshort, 2, "ushort"},
    {MTLDataTypeHalf, ConstantType::kHalf, 2, "half"}, {MTLDataTypeFloat, ConstantType::kFloat, 4, "float"},
};

const char* name_of(ConstantType type) {
  for (const TypeInfo& info : kTypes) {
    if (info.type == type) return info.name;
  }
  return "unknown";
}

}  // namespace

@implementation MTLCompileOptions
@synthesize languageVersion = languageVersion_;
@synthesize mathMode = mathMode_;
@synthesize mathFloatingPointFunctions = mathFloatingPointFunctions_;

- (instancetype)init {
  languageVersion_ = MTLLanguageVersion3_2;
  mathMode_ = MTLMathModeFast;
  return self;
}
- (BOOL)fastMathEnabled {
  return mathMode_ == MTLMathModeFast;
}
// The older switch governs the functions too.
- (void)setFastMathEnabled:(BOOL)fastMathEnabled {
  mathMode_ = fastMathEnabled ? MTLMathModeFast : MTLMathModeSafe;
  mathFloatingPointFunctions_ =
      fastMathEnabled ? MTLMathFloatingPointFunctionsFast : MTLMathFloatingPointFunctionsPrecise;
}
@end

@implementation MTLFunctionConstantValues {
  std::map<unsigned, ConstantValue> values_;
}
- (const std::map<unsigned, ConstantValue>&)values {
  return values_;
}
- (void)setConstantValue:(const void*)value type:(MTLDataType)type atIndex:(NSUInteger)index {
  constexpr NSUInteger kMaxIndex = 65535;
  require(value != nullptr, "MTLFunctionConstantValues", _cmd, "value must not be null");
  require(index <= kMaxIndex, "MTLFunctionConstantValues", _cmd, "index must be at most ", kMaxIndex, ", got ", index);
  for (const TypeInfo& info : kTypes) {
    if (info.data_type != type) continue;
    const auto* bytes = static_cast<const std::byte*>(value);
    values_[static_cast<unsigned>(index)] = {info.type, {bytes, bytes + info.size}};
    return;
  }
  require(false, "MTLFunctionConstantValues", _cmd, "type must be a scalar type, got MTLDataType ",
          static_cast<NSUInteger>(type));
}
@end

@interface SimFunction : NSObject <MTLFunction> {
 @public
  id<MTLDevice> device_;
  std::shared_ptr<const metal_sim::Library> library_;
  const metal_sim::Kernel* kernel_;
  std::map<unsigned, std::vector<std::byte>> constants_;
}
@end

@implementation SimFunction
@synthesize label = label_;
- (NSString*)name {
  return to_nsstring(kernel_->name);
}
@end

@implementation SimLibrary {
  id<MTLDevice> device_;
  std::shared_ptr<const metal_sim::Library> compiled_;
}
@synthesize label = label_;

- (instancetype)initWithDevice:(id<MTLDevice>)device compiled:(std::shared_ptr<const metal_sim::Library>)compiled {
  device_ = device;
  compiled_ = std::move(compiled);
  return self;
}

- (NSArray<NSString*>*)functionNames {
  std::vector<NSString*> names;
  for (const std::string& name : compiled_->names()) names.push_back(to_nsstring(name));
  return [NSArray arrayWithObjects:names.data() count:names.size()];
}

- (id<MTLFunction>)newFunctionWithName:(NSString*)name
                        constantValues:(MTLFunctionConstantValues*)constantValues
                                 error:(NSError* __autoreleasing*)error {
  require(name != nil, "MTLLibrary", _cmd, "name must not be nil");
  require(constantValues != nil, "MTLLibrary", _cmd, "constantValues must not be nil");
  const metal_sim::Kernel* kernel = compiled_->find(name.UTF8String);
  if (kernel == nullptr) {
    report(error, MTLLibraryErrorDomain, MTLLibraryErrorFunctionNotFound,
           std::string("the library has no function ") + name.UTF8String);
    return nil;
  }
  SimFunction* function = [SimFunction new];
  function->device_ = device_;
  function->library_ = compiled_;
  function->kernel_ = kernel;
  // Values at indices that the library does not have are ignored, as Metal does.
  for (const metal_sim::FunctionConstant& constant : compiled_->constants()) {
    auto found = constantValues.values.find(constant.index);
    if (found == constantValues.values.end()) continue;
    require(found->second.type == constant.type, "MTLLibrary", _cmd, "constant ", constant.name, " at index ",
            constant.index, " must be ", name_of(constant.type), ", got ", name_of(found->second.type));
    function->constants_[constant.index] = found->second.bytes;
  }
  for (unsigned index : kernel->required_constants) {
    if (function->constants_.count(index) != 0) continue;
    report(error, MTLLibraryErrorDomain, MTLLibraryErrorCompileFailure,
           kernel->name + " needs a value for the function constant at index " + std::to_string(index));
    return nil;
  }
  return function;
}

@end

@implementation MTLComputePipelineDescriptor
@end

@implementation SimComputePipelineState
@synthesize device = device_;
@synthesize pipeline = pipeline_;
@synthesize label = label_;

- (instancetype)initWithDevice:(id<MTLDevice>)device descriptor:(MTLComputePipelineDescriptor*)descriptor {
  constexpr NSUInteger kMost = metal_sim::kMaxThreadsPerThreadgroup;
  const SEL method = @selector(newComputePipelineStateWithDescriptor:options:reflection:error:);
  require(descriptor != nil, "MTLDevice", method, "descriptor must not be nil");
  auto* function = static_cast<SimFunction*>(descriptor.computeFunction);
  require(function != nil, "MTLDevice", method, "computeFunction must not be nil");
  require(function->device_ == device, "MTLDevice", method, "computeFunction must be of this device");
  const NSUInteger wanted = descriptor.maxTotalThreadsPerThreadgroup;
  require(wanted <= kMost, "MTLDevice", method, "maxTotalThreadsPerThreadgroup must be at most ", kMost, ", got ",
          wanted);
  device_ = device;
  label_ = descriptor.label;
  pipeline_ = std::make_shared<const metal_sim::Pipeline>(
      metal_sim::Pipeline{function->library_, function->kernel_, function->constants_, wanted == 0 ? kMost : wanted,
                          static_cast<bool>(descriptor.threadGroupSizeIsMultipleOfThreadExecutionWidth)});
  return self;
}
- (NSUInteger)maxTotalThreadsPerThreadgroup {
  return pipeline_->max_threads;
}
- (NSUInteger)threadExecutionWidth {
  return metal_sim::kSimdWidth;
}
@end
