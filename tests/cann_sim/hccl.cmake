# HCCL: up to 8.4 everything is in libhccl.so; from 8.5 libhcomm.so has communicators and the one-sided service, and
# libhccl.so the collectives on top of it.
cann_sim_objects(cann_sim_hcomm
  src/hccl_api.cc
  src/hccl_batch.cc
  src/hccl_comm.cc
  src/hccl_config.cc
  src/hccl_connection.cc
  src/hccl_env.cc
  src/hccl_json.cc
  src/hccl_listener.cc
  src/hccl_memory.cc
  src/hccl_percomm.cc
  src/hccl_prepare.cc
  src/hccl_ranktable.cc
  src/hccl_socket.cc)
cann_sim_objects(cann_sim_collectives src/hccl_collectives.cc)

cann_sim_library(hcomm cann_sim_hcomm hcomm.txt 8.5.0 9.0 9.1 devlib)
cann_sim_library(hccl cann_sim_collectives hccl.txt ${CANN_SIM_FLAVOURS})
target_sources(cann_sim_hccl_8.3 PRIVATE $<TARGET_OBJECTS:cann_sim_hcomm>)
foreach(flavour 8.5.0 9.0 9.1 devlib)
  target_link_libraries(cann_sim_hccl_${flavour} PRIVATE -Wl,--no-as-needed cann_sim_hcomm_${flavour} -Wl,--as-needed)
endforeach()

# An older 8.x whose libhccl.so has no HcclCommPrepare: install(..., prepare=False) puts it into the place of 8.3's.
set(cann_sim_script ${CMAKE_CURRENT_BINARY_DIR}/hccl-no-prepare.map)
cann_sim_exports(hccl_no_prepare.txt 830 ${cann_sim_script})
add_library(cann_sim_hccl_no_prepare SHARED $<TARGET_OBJECTS:cann_sim_hcomm> $<TARGET_OBJECTS:cann_sim_collectives>)
target_link_libraries(cann_sim_hccl_no_prepare PRIVATE kvlink_build cann_sim_core_8.3 ${CMAKE_DL_LIBS})
target_link_options(cann_sim_hccl_no_prepare PRIVATE -Wl,--no-undefined -Wl,--version-script=${cann_sim_script})
set_target_properties(cann_sim_hccl_no_prepare PROPERTIES OUTPUT_NAME hccl LINK_DEPENDS ${cann_sim_script}
  BUILD_RPATH $ORIGIN/../8.3 LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib/cann_sim/no_prepare)
add_dependencies(cann_sim cann_sim_hccl_no_prepare)
