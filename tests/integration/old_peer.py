"""A master that knows only the old fields of the wire: nothing numbered from 100, none of the new RPCs.

Its messages are built from the table below in a descriptor pool of their own, so that nothing generated from this project's
proto file can help by accident.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_S, _D, _B, _I64, _I32, _BYTES = "string", "double", "bool", "int64", "int32", "bytes"
_TYPES = {
    _S: descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    _D: descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE,
    _B: descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
    _I64: descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
    _I32: descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    _BYTES: descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
}
TABLE: dict[str, list[tuple[str, int, str]]] = {
    "WorkerInfo": [
        ("worker_id", 1, _S), ("worker_ip", 2, _S), ("total_cpu", 3, _D), ("total_memory", 4, _D),
        ("total_storage", 5, _D), ("total_gpu", 6, _D),
    ],
    "MasterInfo": [("master_id", 1, _S), ("master_address", 2, _S)],
    "RegisterAck": [("success", 1, _B), ("message", 2, _S)],
    "TaskAck": [("success", 1, _B), ("message", 2, _S)],
    "Ack": [("success", 1, _B), ("message", 2, _S)],
    "HeartbeatAck": [("success", 1, _B)],
    "RunningTask": [
        ("task_id", 1, _S), ("cpu_allocated", 2, _D), ("memory_allocated", 3, _D), ("status", 4, _S),
        ("gpu_allocated", 5, _D),
    ],
    "Heartbeat": [
        ("worker_id", 1, _S), ("cpu_usage", 2, _D), ("memory_usage", 3, _D), ("storage_usage", 4, _D),
        ("running_tasks", 5, "*RunningTask"), ("gpu_usage", 6, _D),
    ],
    "Task": [
        ("task_id", 1, _S), ("docker_image", 2, _S), ("command", 3, _S), ("req_cpu", 4, _D), ("req_memory", 5, _D),
        ("req_storage", 6, _D), ("req_gpu", 7, _D), ("target_worker_id", 8, _S), ("user_id", 9, _S),
        ("sla_multiplier", 10, _D), ("task_type", 11, _S), ("task_name", 12, _S), ("submitted_at", 13, _I64),
    ],
    "TaskResult": [
        ("task_id", 1, _S), ("worker_id", 2, _S), ("status", 3, _S), ("logs", 4, _S), ("result_location", 5, _S),
        ("output_files", 6, "*string"),
    ],
    "TaskID": [("task_id", 1, _S)],
    "TaskLogRequest": [("task_id", 1, _S), ("user_id", 2, _S), ("follow", 3, _B)],
    "LogChunk": [
        ("task_id", 1, _S), ("content", 2, _S), ("timestamp", 3, _S), ("is_complete", 4, _B), ("status", 5, _S),
    ],
    "FileChunk": [
        ("task_id", 1, _S), ("user_id", 2, _S), ("task_name", 3, _S), ("file_path", 4, _S), ("data", 5, _BYTES),
        ("is_last_chunk", 6, _B), ("is_last_file", 7, _B), ("timestamp", 8, _I64),
    ],
    "FileUploadAck": [("success", 1, _B), ("message", 2, _S), ("files_received", 3, _I32)],
}  # fmt: skip


def _messages() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="old.proto", package="cluster", syntax="proto3")
    for name, fields in TABLE.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind in fields:
            repeated = kind.startswith("*")
            kind = kind.lstrip("*")
            row = message.field.add(name=field_name, number=number)
            row.label = row.LABEL_REPEATED if repeated else row.LABEL_OPTIONAL
            if kind in _TYPES:
                row.type = _TYPES[kind]
            else:
                row.type, row.type_name = row.TYPE_MESSAGE, f".cluster.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"cluster.{name}")) for name in TABLE}


OLD: dict[str, Any] = _messages()


@dataclass
class OldMaster:
    """The old master's server: what it was told, in order. `forget` makes it lose its nodes, as after a restart."""

    reports: list[Any] = field(default_factory=list)
    heartbeats: list[Any] = field(default_factory=list)
    registrations: list[Any] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    chunks: list[Any] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    refuse_reports: int = 0
    port: int = 0
    _server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> OldMaster:
        def unary(method: Any, request: str, reply: str) -> grpc.RpcMethodHandler[Any, Any]:
            return grpc.unary_unary_rpc_method_handler(method, OLD[request].FromString, OLD[reply].SerializeToString)

        handlers = {
            "RegisterWorker": unary(self._register, "WorkerInfo", "RegisterAck"),
            "SendHeartbeat": unary(self._beat, "Heartbeat", "HeartbeatAck"),
            "ReportTaskCompletion": unary(self._report, "TaskResult", "Ack"),
            "UploadTaskFiles": grpc.stream_unary_rpc_method_handler(
                self._upload, OLD["FileChunk"].FromString, OLD["FileUploadAck"].SerializeToString
            ),
        }
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("cluster.MasterWorker", handlers),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()
        return self

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    def forget(self) -> None:
        self.known.clear()

    async def until(self, check: Any, seconds: float = 60.0) -> None:
        async with asyncio.timeout(seconds):
            while not check():
                await asyncio.sleep(0.02)

    async def report_of(self, task_id: str, seconds: float = 60.0) -> Any:
        await self.until(lambda: any(report.task_id == task_id for report in self.reports), seconds)
        return next(report for report in self.reports if report.task_id == task_id)

    def count(self, task_id: str) -> int:
        return sum(report.task_id == task_id for report in self.reports)

    async def _register(self, request: Any, _context: Any) -> Any:
        self.registrations.append(request)
        self.known.add(request.worker_id)
        return OLD["RegisterAck"](success=True, message="welcome")

    async def _beat(self, request: Any, _context: Any) -> Any:
        self.heartbeats.append(request)
        return OLD["HeartbeatAck"](success=request.worker_id in self.known)

    async def _report(self, request: Any, _context: Any) -> Any:
        if self.refuse_reports > 0:
            self.refuse_reports -= 1
            return OLD["Ack"](success=False, message="not now")
        self.reports.append(request)
        return OLD["Ack"](success=True)

    async def _upload(self, stream: AsyncIterator[Any], _context: Any) -> Any:
        files: dict[str, bytes] = {}
        async for chunk in stream:
            self.chunks.append(chunk)
            files[chunk.file_path] = files.get(chunk.file_path, b"") + chunk.data
            self.files[chunk.task_id] = files
        return OLD["FileUploadAck"](success=True, files_received=len(files))


class OldClient:
    """What an old master calls on a node."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address)

    async def close(self) -> None:
        await self.channel.close(None)

    async def __aenter__(self) -> OldClient:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def _call(self, method: str, request: Any, reply: str, timeout: float = 10.0) -> Any:
        call = self.channel.unary_unary(
            f"/cluster.MasterWorker/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=OLD[reply].FromString,
        )
        return await call(request, timeout=timeout)

    async def register(self, address: str) -> Any:
        return await self._call(
            "MasterRegister", OLD["MasterInfo"](master_id="m", master_address=address), "RegisterAck"
        )

    async def assign(self, **fields: Any) -> Any:
        fields = {
            "docker_image": "nodeservice/demo",
            "req_cpu": 0.1,
            "req_memory": 0.03125,
            "req_storage": 0.01,
        } | fields
        return await self._call("AssignTask", OLD["Task"](**fields), "TaskAck")

    async def cancel(self, task_id: str) -> Any:
        return await self._call("CancelTask", OLD["TaskID"](task_id=task_id), "TaskAck")

    def logs(self, task_id: str, *, follow: bool) -> Any:
        call = self.channel.unary_stream(
            "/cluster.MasterWorker/StreamTaskLogs",
            request_serializer=OLD["TaskLogRequest"].SerializeToString,
            response_deserializer=OLD["LogChunk"].FromString,
        )
        return call(OLD["TaskLogRequest"](task_id=task_id, user_id="u", follow=follow))
