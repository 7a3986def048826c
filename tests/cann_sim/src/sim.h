// Everything a simulated vendor library builds on; see ../README.md.
#pragma once

#include "call.h"
#include "context.h"
#include "memory.h"
#include "settings.h"
#include "stream.h"
