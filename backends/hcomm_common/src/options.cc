#include "options.h"

namespace kvlink::hcomm {

ascend::Failure parse_options(const kvl_engine_params &params, Options *options) {
  ascend::OptionTable table;
  options->declare(&table);
  table.number("device_port", 0, 65535, &options->device_port);
  table.number("streams", 1, 16, &options->streams);
  table.number("super_device_id", 0, UINT32_MAX, &options->super_device_id);
  table.number("super_pod_id", 0, UINT32_MAX, &options->super_pod_id);
  const ascend::Failure failure = table.parse(params);
  return failure.ok() ? options->complete() : failure;
}

}  // namespace kvlink::hcomm
