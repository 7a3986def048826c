# How everything native of kvlink is compiled: included by the root and by each backend that is built alone.
include_guard(GLOBAL)

get_filename_component(KVLINK_ROOT ${CMAKE_CURRENT_LIST_DIR} DIRECTORY)

set(KVLINK_SANITIZE "" CACHE STRING "Sanitizer to build with: empty, address (ASan+UBSan) or thread (TSan)")
set_property(CACHE KVLINK_SANITIZE PROPERTY STRINGS "" address thread)
option(KVLINK_TESTS "Build the native tests" OFF)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_C_STANDARD 11)
set(CMAKE_C_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_C_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

find_package(Threads REQUIRED)

add_library(kvlink_build INTERFACE)
target_include_directories(kvlink_build INTERFACE ${KVLINK_ROOT}/include)
target_compile_options(kvlink_build INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Werror)
target_link_libraries(kvlink_build INTERFACE Threads::Threads)
if(KVLINK_SANITIZE STREQUAL "address")
  target_compile_options(kvlink_build INTERFACE -fsanitize=address,undefined -fno-sanitize-recover=undefined
                                                -fno-omit-frame-pointer -g -O1)
  target_link_options(kvlink_build INTERFACE -fsanitize=address,undefined)
elseif(KVLINK_SANITIZE STREQUAL "thread")
  target_compile_options(kvlink_build INTERFACE -fsanitize=thread -fno-omit-frame-pointer -g -O1)
  target_link_options(kvlink_build INTERFACE -fsanitize=thread)
elseif(KVLINK_SANITIZE)
  message(FATAL_ERROR "KVLINK_SANITIZE is '${KVLINK_SANITIZE}'; expected address, thread or empty")
endif()

# kvlink_shared(NAME sources...): a shared library as all of kvlink's are: nothing undefined, no C++ runtime asked of the
# host, so that one wheel works on every distribution whose C library is new enough. libgcc_s is the host's: it is on every
# host, and the static one asks for a newer C library than anything of ours does. What nobody calls is dropped, for the
# parts of the C++ runtime that would ask for a newer one, too.
function(kvlink_shared name)
  add_library(${name} SHARED ${ARGN})
  target_link_libraries(${name} PRIVATE kvlink_build ${CMAKE_DL_LIBS})
  target_link_options(${name} PRIVATE -Wl,--no-undefined -Wl,--exclude-libs,ALL -Wl,--gc-sections)
  if(NOT KVLINK_SANITIZE)
    target_link_options(${name} PRIVATE -static-libstdc++)
  endif()
endfunction()

# kvlink_library(NAME sources...): a shared library that goes into the core wheel's kvlink/_native folder.
function(kvlink_library name)
  kvlink_shared(${name} ${ARGN})
  install(TARGETS ${name} LIBRARY DESTINATION kvlink/_native)
endfunction()

if(KVLINK_TESTS)
  enable_testing()
endif()
