# HIXL (CANN 8.5 on): the C++ class over libhcomm.so, which it loads itself, and the strings of its interface.
cann_sim_objects(cann_sim_metadef src/metadef.cc)
cann_sim_library(metadef cann_sim_metadef metadef.txt 8.5.0 9.0 9.1 devlib)

cann_sim_objects(cann_sim_hixl
  src/hccl_socket.cc
  src/hccl_json.cc
  src/hixl_api.cc
  src/hixl_async.cc
  src/hixl_channel.cc
  src/hixl_engine.cc
  src/hixl_hccl.cc
  src/hixl_name.cc
  src/hixl_options.cc
  src/hixl_pool.cc
  src/hixl_server.cc
  src/hixl_status.cc
  src/hixl_transfer.cc
  src/hixl_wire.cc)
cann_sim_library(cann_hixl cann_sim_hixl cann_hixl.txt 8.5.0 9.0 9.1 devlib)
foreach(flavour 8.5.0 9.0 9.1 devlib)
  target_link_libraries(cann_sim_cann_hixl_${flavour} PRIVATE cann_sim_metadef_${flavour})
endforeach()

# The client that the rule tests of HIXL call from Python.
cann_sim_objects(cann_sim_hixl_client_objects src/hixl_client.cc)
add_library(cann_sim_hixl_client SHARED $<TARGET_OBJECTS:cann_sim_hixl_client_objects>)
target_link_libraries(cann_sim_hixl_client PRIVATE kvlink_build ${CMAKE_DL_LIBS} cann_sim_cann_hixl_8.5.0
                                                   cann_sim_metadef_8.5.0)
set_target_properties(cann_sim_hixl_client PROPERTIES OUTPUT_NAME hixl_client SKIP_BUILD_RPATH ON
  LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib/cann_sim)
add_dependencies(cann_sim cann_sim_hixl_client)
