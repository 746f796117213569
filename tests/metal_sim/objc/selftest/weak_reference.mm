// Must not compile: the runtime has no weak references.
void hold(id object) {
  __weak id reference = object;
}
