from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DeviceEvent(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEVICE_EVENT_UNSPECIFIED: _ClassVar[DeviceEvent]
    DEVICE_EVENT_STARTED: _ClassVar[DeviceEvent]
    DEVICE_EVENT_DOWNLOADED: _ClassVar[DeviceEvent]
    DEVICE_EVENT_STAGED: _ClassVar[DeviceEvent]
    DEVICE_EVENT_COMMITTED: _ClassVar[DeviceEvent]
    DEVICE_EVENT_REVERTED: _ClassVar[DeviceEvent]
    DEVICE_EVENT_REJECTED: _ClassVar[DeviceEvent]
    DEVICE_EVENT_FAILED: _ClassVar[DeviceEvent]
    DEVICE_EVENT_HEALTH: _ClassVar[DeviceEvent]

class RejectReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REJECT_REASON_UNSPECIFIED: _ClassVar[RejectReason]
    REJECT_REASON_METADATA_SIGNATURE: _ClassVar[RejectReason]
    REJECT_REASON_METADATA_ROLLBACK: _ClassVar[RejectReason]
    REJECT_REASON_METADATA_EXPIRED: _ClassVar[RejectReason]
    REJECT_REASON_METADATA_MALFORMED: _ClassVar[RejectReason]
    REJECT_REASON_ROLES_DISAGREE: _ClassVar[RejectReason]
    REJECT_REASON_DOWNGRADE: _ClassVar[RejectReason]
    REJECT_REASON_WRONG_BASE: _ClassVar[RejectReason]
    REJECT_REASON_UNSUPPORTED_RUNTIME: _ClassVar[RejectReason]
    REJECT_REASON_PAYLOAD_DIGEST: _ClassVar[RejectReason]
    REJECT_REASON_PAYLOAD_MALFORMED: _ClassVar[RejectReason]
    REJECT_REASON_GUARD: _ClassVar[RejectReason]
    REJECT_REASON_KNOWN_BAD: _ClassVar[RejectReason]
    REJECT_REASON_QUALITY_REGRESSED: _ClassVar[RejectReason]
    REJECT_REASON_SELF_TEST: _ClassVar[RejectReason]
    REJECT_REASON_NO_SPACE: _ClassVar[RejectReason]
    REJECT_REASON_CLOCK: _ClassVar[RejectReason]
    REJECT_REASON_HEALTH_REGRESSED: _ClassVar[RejectReason]
    REJECT_REASON_CONTENT_KEY: _ClassVar[RejectReason]
DEVICE_EVENT_UNSPECIFIED: DeviceEvent
DEVICE_EVENT_STARTED: DeviceEvent
DEVICE_EVENT_DOWNLOADED: DeviceEvent
DEVICE_EVENT_STAGED: DeviceEvent
DEVICE_EVENT_COMMITTED: DeviceEvent
DEVICE_EVENT_REVERTED: DeviceEvent
DEVICE_EVENT_REJECTED: DeviceEvent
DEVICE_EVENT_FAILED: DeviceEvent
DEVICE_EVENT_HEALTH: DeviceEvent
REJECT_REASON_UNSPECIFIED: RejectReason
REJECT_REASON_METADATA_SIGNATURE: RejectReason
REJECT_REASON_METADATA_ROLLBACK: RejectReason
REJECT_REASON_METADATA_EXPIRED: RejectReason
REJECT_REASON_METADATA_MALFORMED: RejectReason
REJECT_REASON_ROLES_DISAGREE: RejectReason
REJECT_REASON_DOWNGRADE: RejectReason
REJECT_REASON_WRONG_BASE: RejectReason
REJECT_REASON_UNSUPPORTED_RUNTIME: RejectReason
REJECT_REASON_PAYLOAD_DIGEST: RejectReason
REJECT_REASON_PAYLOAD_MALFORMED: RejectReason
REJECT_REASON_GUARD: RejectReason
REJECT_REASON_KNOWN_BAD: RejectReason
REJECT_REASON_QUALITY_REGRESSED: RejectReason
REJECT_REASON_SELF_TEST: RejectReason
REJECT_REASON_NO_SPACE: RejectReason
REJECT_REASON_CLOCK: RejectReason
REJECT_REASON_HEALTH_REGRESSED: RejectReason
REJECT_REASON_CONTENT_KEY: RejectReason

class EnrolRequest(_message.Message):
    __slots__ = ("token", "certificate_request", "inventory", "tags")
    class TagsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    INVENTORY_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    token: str
    certificate_request: bytes
    inventory: Inventory
    tags: _containers.ScalarMap[str, str]
    def __init__(self, token: _Optional[str] = ..., certificate_request: _Optional[bytes] = ..., inventory: _Optional[_Union[Inventory, _Mapping]] = ..., tags: _Optional[_Mapping[str, str]] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("device_id", "certificate", "authority", "root")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    certificate: bytes
    authority: bytes
    root: bytes
    def __init__(self, device_id: _Optional[str] = ..., certificate: _Optional[bytes] = ..., authority: _Optional[bytes] = ..., root: _Optional[bytes] = ...) -> None: ...

class Inventory(_message.Message):
    __slots__ = ("agent_version", "base_digest", "runtime", "memory_bytes", "cpu_count", "platform")
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_COUNT_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    agent_version: str
    base_digest: str
    runtime: str
    memory_bytes: int
    cpu_count: int
    platform: str
    def __init__(self, agent_version: _Optional[str] = ..., base_digest: _Optional[str] = ..., runtime: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., cpu_count: _Optional[int] = ..., platform: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("timestamp_version", "root_version", "running_release")
    TIMESTAMP_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROOT_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUNNING_RELEASE_FIELD_NUMBER: _ClassVar[int]
    timestamp_version: int
    root_version: int
    running_release: str
    def __init__(self, timestamp_version: _Optional[int] = ..., root_version: _Optional[int] = ..., running_release: _Optional[str] = ...) -> None: ...

class WatchEvent(_message.Message):
    __slots__ = ("bundle", "heartbeat")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    bundle: MetadataBundle
    heartbeat: Heartbeat
    def __init__(self, bundle: _Optional[_Union[MetadataBundle, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class MetadataBundle(_message.Message):
    __slots__ = ("files",)
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.ScalarMap[str, bytes]
    def __init__(self, files: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("server_time_unix_ms",)
    SERVER_TIME_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    server_time_unix_ms: int
    def __init__(self, server_time_unix_ms: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("path", "offset")
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    path: str
    offset: int
    def __init__(self, path: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ContentKeyRequest(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class ContentKeyReply(_message.Message):
    __slots__ = ("wrapped",)
    WRAPPED_FIELD_NUMBER: _ClassVar[int]
    wrapped: bytes
    def __init__(self, wrapped: _Optional[bytes] = ...) -> None: ...

class ReportBatch(_message.Message):
    __slots__ = ("reports",)
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    reports: _containers.RepeatedCompositeFieldContainer[SignedReport]
    def __init__(self, reports: _Optional[_Iterable[_Union[SignedReport, _Mapping]]] = ...) -> None: ...

class SignedReport(_message.Message):
    __slots__ = ("body", "signature")
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    signature: bytes
    def __init__(self, body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class ReportBody(_message.Message):
    __slots__ = ("device_id", "sequence", "time_unix_ms", "release", "rollout", "round_sequence", "event", "reason", "detail", "quality", "health", "payload_bytes")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    ROUND_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    sequence: int
    time_unix_ms: int
    release: str
    rollout: str
    round_sequence: int
    event: DeviceEvent
    reason: RejectReason
    detail: str
    quality: Quality
    health: Health
    payload_bytes: int
    def __init__(self, device_id: _Optional[str] = ..., sequence: _Optional[int] = ..., time_unix_ms: _Optional[int] = ..., release: _Optional[str] = ..., rollout: _Optional[str] = ..., round_sequence: _Optional[int] = ..., event: _Optional[_Union[DeviceEvent, str]] = ..., reason: _Optional[_Union[RejectReason, str]] = ..., detail: _Optional[str] = ..., quality: _Optional[_Union[Quality, _Mapping]] = ..., health: _Optional[_Union[Health, _Mapping]] = ..., payload_bytes: _Optional[int] = ...) -> None: ...

class Quality(_message.Message):
    __slots__ = ("examples", "accuracy_before", "accuracy_after", "latency_ms_before", "latency_ms_after")
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_BEFORE_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_AFTER_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_AFTER_FIELD_NUMBER: _ClassVar[int]
    examples: int
    accuracy_before: float
    accuracy_after: float
    latency_ms_before: float
    latency_ms_after: float
    def __init__(self, examples: _Optional[int] = ..., accuracy_before: _Optional[float] = ..., accuracy_after: _Optional[float] = ..., latency_ms_before: _Optional[float] = ..., latency_ms_after: _Optional[float] = ...) -> None: ...

class Health(_message.Message):
    __slots__ = ("memory_available_bytes", "process_memory_bytes", "disk_free_bytes", "load_1min", "battery_percent", "temperature_celsius")
    MEMORY_AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROCESS_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_1MIN_FIELD_NUMBER: _ClassVar[int]
    BATTERY_PERCENT_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_CELSIUS_FIELD_NUMBER: _ClassVar[int]
    memory_available_bytes: int
    process_memory_bytes: int
    disk_free_bytes: int
    load_1min: float
    battery_percent: int
    temperature_celsius: float
    def __init__(self, memory_available_bytes: _Optional[int] = ..., process_memory_bytes: _Optional[int] = ..., disk_free_bytes: _Optional[int] = ..., load_1min: _Optional[float] = ..., battery_percent: _Optional[int] = ..., temperature_celsius: _Optional[float] = ...) -> None: ...

class ReportAck(_message.Message):
    __slots__ = ("accepted_through",)
    ACCEPTED_THROUGH_FIELD_NUMBER: _ClassVar[int]
    accepted_through: int
    def __init__(self, accepted_through: _Optional[int] = ...) -> None: ...
