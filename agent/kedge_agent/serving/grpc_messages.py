"""The messages of the Open Inference Protocol's gRPC service (kserve/open-inference-protocol, ``grpc_service.proto``,
with Triton's extensions), built from a table: generated code would tie the agent to one version of protobuf.

Nested messages are defined at the top level here, and enums are int32: neither changes a byte on the wire.
"""

from __future__ import annotations

import functools
from typing import Any

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

_TABLE = """
ServerLiveRequest
ServerLiveResponse            live:1:bool
ServerReadyRequest
ServerReadyResponse           ready:1:bool
ModelReadyRequest             name:1:string version:2:string
ModelReadyResponse            ready:1:bool
ServerMetadataRequest
ServerMetadataResponse        name:1:string version:2:string extensions:3:string*
ModelMetadataRequest          name:1:string version:2:string
TensorMetadata                name:1:string datatype:2:string shape:3:int64*
ModelMetadataResponse         name:1:string versions:2:string* platform:3:string inputs:4:TensorMetadata* outputs:5:TensorMetadata*
InferParameter                bool_param:1:bool int64_param:2:int64 string_param:3:string double_param:4:double uint64_param:5:uint64
InferTensorContents           bool_contents:1:bool* int_contents:2:int32* int64_contents:3:int64* uint_contents:4:uint32* uint64_contents:5:uint64* fp32_contents:6:float* fp64_contents:7:double* bytes_contents:8:bytes*
InferInputTensor              name:1:string datatype:2:string shape:3:int64* parameters:4:map contents:5:InferTensorContents
InferRequestedOutputTensor    name:1:string parameters:2:map
ModelInferRequest             model_name:1:string model_version:2:string id:3:string parameters:4:map inputs:5:InferInputTensor* outputs:6:InferRequestedOutputTensor* raw_input_contents:7:bytes*
InferOutputTensor             name:1:string datatype:2:string shape:3:int64* parameters:4:map
ModelInferResponse            model_name:1:string model_version:2:string id:3:string parameters:4:map outputs:5:InferOutputTensor* raw_output_contents:6:bytes*
ModelStreamInferResponse      error_message:1:string infer_response:2:ModelInferResponse
ModelConfigRequest            name:1:string version:2:string
ModelInput                    name:1:string data_type:2:int32 dims:4:int64*
ModelOutput                   name:1:string data_type:2:int32 dims:3:int64*
ModelInstanceGroup            name:1:string count:2:int32 kind:4:int32
ModelDynamicBatching          preferred_batch_size:1:int32* max_queue_delay_microseconds:2:uint64
ModelConfig                   name:1:string platform:2:string max_batch_size:4:int32 input:5:ModelInput* output:6:ModelOutput* instance_group:7:ModelInstanceGroup* dynamic_batching:11:ModelDynamicBatching backend:17:string
ModelConfigResponse           config:1:ModelConfig
ModelStatisticsRequest        name:1:string version:2:string
StatisticDuration             count:1:uint64 ns:2:uint64
InferStatistics               success:1:StatisticDuration fail:2:StatisticDuration queue:3:StatisticDuration compute_input:4:StatisticDuration compute_infer:5:StatisticDuration compute_output:6:StatisticDuration cache_hit:7:StatisticDuration cache_miss:8:StatisticDuration
InferBatchStatistics          batch_size:1:uint64 compute_infer:3:StatisticDuration
ModelStatistics               name:1:string version:2:string last_inference:3:uint64 inference_count:4:uint64 execution_count:5:uint64 inference_stats:6:InferStatistics batch_stats:7:InferBatchStatistics*
ModelStatisticsResponse       model_stats:1:ModelStatistics*
RepositoryIndexRequest        repository_name:1:string ready:2:bool
ModelIndex                    name:1:string version:2:string state:3:string reason:4:string
RepositoryIndexResponse       models:1:ModelIndex*
RepositoryModelLoadRequest    repository_name:1:string model_name:2:string parameters:3:map
RepositoryModelLoadResponse
RepositoryModelUnloadRequest  repository_name:1:string model_name:2:string parameters:3:map
RepositoryModelUnloadResponse
"""  # noqa: E501 -- one message a line

DATA_TYPES = ("INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16",
              "FP32", "FP64", "STRING", "BF16")  # fmt: skip
"""Values of ``DataType`` in a model's configuration, by number."""
INSTANCE_KINDS = ("KIND_AUTO", "KIND_GPU", "KIND_CPU")
"""The same of ``ModelInstanceGroup.Kind``."""


@functools.cache
def message_classes() -> dict[str, Any]:
    """Return message name → class."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="kedge_inference.proto", package=PACKAGE, syntax="proto3")
    for line in _TABLE.strip().splitlines():
        name, *fields = line.split()
        message = file.message_type.add(name=name)
        for one in fields:
            label, number, kind = one.split(":")
            repeated = kind.endswith("*") or kind == "map"
            field = message.field.add(name=label, number=int(number))
            field.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            if kind == "map":
                _add_map(message, field)
            elif kind[0].isupper():
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
            else:
                field.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindFileByName(file.name).message_types_by_name
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


def _add_map(message: Any, field: Any) -> None:
    """Add a ``map<string, InferParameter>``: a repeated message of key and value (protobuf's language guide,
    "Maps")."""
    entry = message.nested_type.add(name="ParametersEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=1, type=9)
    entry.field.add(name="value", number=2, label=1, type=11, type_name=f".{PACKAGE}.InferParameter")
    field.type, field.type_name = 11, f".{PACKAGE}.{message.name}.ParametersEntry"
