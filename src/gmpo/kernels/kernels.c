/* All kernels in one unit; those below are written once for bf16 and once for float. */
#include "common.h"
#include "transposed.h"
#include "linear.h"

#define T bf16
#define WIDE wide_bf16
#define NARROW narrow_bf16
#define NAME(name) name##_bf16
#include "attention.h"
#include "norms.h"
#include "training.h"
#include "decoding.h"
#include "optimizer.h"
#undef T
#undef WIDE
#undef NARROW
#undef NAME

#define T float
#define WIDE wide_float
#define NARROW narrow_float
#define NAME(name) name##_float
#include "attention.h"
#include "norms.h"
#include "training.h"
#include "decoding.h"
#include "optimizer.h"
#undef T
#undef WIDE
#undef NARROW
#undef NAME
