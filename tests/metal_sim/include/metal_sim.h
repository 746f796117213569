// Metal shading language as C++: what a translated source includes first.
#pragma once

#include "abi.h"
#include "atomics.h"
#include "math.h"
#include "simdgroup.h"
#include "types.h"
#if !defined(METAL_SIM_TYPE_CHECK)
#include "registration.h"
#endif
#include "qualifiers.h"
