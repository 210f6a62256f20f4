// The CPU kernels for the compiler's default instruction set, which every processor of the platform has.
#include "kernels.h"
#define MEGACODER_ISA baseline
#define MEGACODER_ISA_NAME "baseline"
#define MEGACODER_LANES 8
#include "kernels.inc"
