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
