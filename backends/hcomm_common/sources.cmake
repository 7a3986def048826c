# What hccl and hcomm_onesided share: everything but the policy, which says in which vendor library the functions are.
get_filename_component(KVLINK_HCOMM_INCLUDE ${CMAKE_CURRENT_LIST_DIR}/src ABSOLUTE)
set(KVLINK_HCOMM_SOURCES "")
foreach(part blob connection engine flight link options provider submit topology)
  list(APPEND KVLINK_HCOMM_SOURCES ${KVLINK_HCOMM_INCLUDE}/${part}.cc)
endforeach()
