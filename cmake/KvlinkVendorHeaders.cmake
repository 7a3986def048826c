# Where the vendor's public headers are, our declarations of the vendor's functions, values and structs are compiled
# against them, by exact type. An object file is all that comes of it: the build fails when a declaration differs.
include_guard(GLOBAL)

# The folder that holds ascend/*.h and ascend/*.inc.
set(KVLINK_DECLARATIONS ${KVLINK_ROOT}/backends CACHE PATH "Declarations to compare with the vendor's headers")
mark_as_advanced(KVLINK_DECLARATIONS)

# Structs that check.cc compares field by field, where a header set has them.
set(_KVLINK_STRUCTS aclrtMemLocation aclrtPtrAttributes aclCANNPackageVersion HcclMem HcclOneSideOpDesc
    HcclPrepareConfig HcclMemDescs HcclCommConfig)

# Splits our function list by whether the preprocessed headers declare the function: the lines of those that they do go to
# out_file, the names to the caller's variables `checked` and `undeclared`.
function(_kvlink_declared_functions list macro text out_file)
  file(STRINGS ${list} lines REGEX "^${macro}\\(")
  set(kept "")
  foreach(line IN LISTS lines)
    if(NOT line MATCHES "^${macro}\\([a-z]+, [^,]*, ([A-Za-z0-9_]+), ")
      message(FATAL_ERROR "${list}: cannot read the function of: ${line}")
    endif()
    set(name ${CMAKE_MATCH_1})
    if(text MATCHES "[^A-Za-z0-9_]${name}[ \t\r\n]*\\(")
      string(APPEND kept "${line}\n")
      list(APPEND checked ${name})
    else()
      list(APPEND undeclared ${name})
    endif()
  endforeach()
  file(WRITE ${out_file} "${kept}")
  set(checked ${checked} PARENT_SCOPE)
  set(undeclared ${undeclared} PARENT_SCOPE)
endfunction()

# kvlink_compare_headers(FOLDERS): adds the comparison with the headers in these include folders to the build; prints
# which of our functions were compared and which the headers lack.
function(kvlink_compare_headers folders)
  set(sources ${KVLINK_ROOT}/cmake/vendor_headers)
  set(generated ${CMAKE_BINARY_DIR}/vendor_headers)
  set(includes "")
  foreach(folder IN LISTS folders)
    list(APPEND includes -isystem ${folder})
  endforeach()
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -std=c++17 -E -dD -x c++ ${includes} ${sources}/vendor.h
                  OUTPUT_VARIABLE text ERROR_VARIABLE error RESULT_VARIABLE code)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "The vendor headers in ${folders} do not compile: ${error}")
  endif()
  string(REPLACE ";" " " text "${text}") # one string for CMake, not a list
  set(declarations ${KVLINK_DECLARATIONS}/ascend)

  set(checked "")
  set(undeclared "")
  _kvlink_declared_functions(${declarations}/acl_functions.inc KVLINK_ACL "${text}" ${generated}/acl_declared.inc)
  _kvlink_declared_functions(${declarations}/hccl_functions.inc KVLINK_HCCL "${text}" ${generated}/hccl_declared.inc)
  # Values by name, macros too. The RESERVED sentinels move with every release that adds a value before them.
  set(values "")
  set(value_count 0)
  foreach(header acl_types.h hccl_types.h)
    file(STRINGS ${declarations}/${header} lines REGEX "[^A-Za-z0-9_](ACL|HCCL|COMM|UDI)_[A-Z0-9_]+ = ")
    string(REGEX MATCHALL "[^A-Za-z0-9_](ACL|HCCL|COMM|UDI)_[A-Z0-9_]+ = " names ";${lines}")
    foreach(name IN LISTS names)
      string(REGEX REPLACE "[^A-Z0-9_]" "" name "${name}")
      if(name AND NOT name MATCHES "_RESERVED$" AND text MATCHES "[^A-Za-z0-9_]${name}[^A-Za-z0-9_]")
        string(APPEND values "KVLINK_VALUE(${name})\n")
        math(EXPR value_count "${value_count} + 1")
      endif()
    endforeach()
  endforeach()
  file(WRITE ${generated}/values_declared.inc "${values}")
  set(structs "")
  foreach(name IN LISTS _KVLINK_STRUCTS)
    if(text MATCHES "[^A-Za-z0-9_]${name}[^A-Za-z0-9_]")
      string(APPEND structs "#define KVLINK_DECLARED_${name}\n")
    endif()
  endforeach()
  file(WRITE ${generated}/declared.h "${structs}")

  list(LENGTH checked count)
  list(JOIN checked " " checked)
  list(JOIN undeclared " " undeclared)
  message(STATUS "Vendor headers: ${count} functions and ${value_count} values compared: ${checked}")
  message(STATUS "Vendor headers: not declared there: ${undeclared}")

  add_library(kvlink_vendor_headers OBJECT ${sources}/check.cc)
  target_link_libraries(kvlink_vendor_headers PRIVATE kvlink_build)
  target_include_directories(kvlink_vendor_headers PRIVATE ${KVLINK_DECLARATIONS} ${generated} ${sources})
  target_include_directories(kvlink_vendor_headers SYSTEM PRIVATE ${folders})
  target_compile_options(kvlink_vendor_headers PRIVATE -Wno-deprecated-declarations) # the vendor deprecates, and keeps
endfunction()

# kvlink_check_vendor_headers(ROOT): ROOT is a toolkit's folder; nothing happens when it is empty or has no headers.
function(kvlink_check_vendor_headers root)
  if(NOT root OR TARGET kvlink_vendor_headers)
    return()
  endif()
  set(folders "")
  set(found FALSE)
  foreach(base ${root} ${root}/${CMAKE_SYSTEM_PROCESSOR}-linux)
    foreach(folder include pkg_inc include/experiment)
      if(IS_DIRECTORY "${base}/${folder}")
        list(APPEND folders "${base}/${folder}")
      endif()
    endforeach()
    if(EXISTS "${base}/include/acl/acl.h")
      set(found TRUE)
    endif()
  endforeach()
  if(NOT found)
    message(STATUS "No vendor headers under ${root}: our declarations are not compared with them")
    return()
  endif()
  kvlink_compare_headers("${folders}")
endfunction()
