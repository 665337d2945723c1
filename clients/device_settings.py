"""Settings of a device process, parsed once, at its start, from four places in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from clients.errors import ClientError
from clients.watch import WatchPolicy


class DeviceError(ClientError):
    """A device that cannot start; the message says what to do."""


class DeviceSettings(BaseSettings):
    """Settings of a device; flag > environment (AIRPEFT_DEVICE_...) > device.toml > default.

    Attributes:
        base: base model, a known name or a folder.
        heldout: the device's own labelled examples; without them a release is only self-tested.
        text_column: its column with the text.
        label_column: its column with the class.
        heldout_limit: examples used for a probe, at most.
        port: of the local endpoint; 0 for a free one.
        threads: torch threads.
        max_length: tokens of a text that are looked at.
        quality_tolerance: how much accuracy may fall with a new release, 0 to 1.
        health_seconds: between two health reports.
        reconnect_seconds: first and largest bound of the wait after a lost link.
        time_zone: of the device, such as Europe/Berlin, for install windows; empty: the system's.
        update_lock: command and arguments; a status other than 0 means that now is a bad time to
            load a release. A file update.lock in the home folder says the same.
        lock_seconds: between two looks at what holds a release back.
        min_battery_percent: no release is loaded while the battery, if there is one, has less.
        watch_seconds: after an install the device watches its health for at least so long.
        max_temperature_celsius: of the hottest sensor; a release that takes the device beyond it
            while it is watched goes back. None: not looked at.
        max_load_rise: likewise, how much the load of one minute may grow. None: not looked at.
        later_seconds: first and largest bound of the wait before a failed install is tried again.
        sources: where releases come from, in order: fleet, https://..., folders (clients.sources).
        source_authority: certificate (PEM) that HTTPS sources may be signed by, beside the fleet's
            authority and the system's.
        mirror_seconds: between two looks at the sources while the fleet is away.
        log_level: of the ``airpeft`` loggers.
    """

    model_config = SettingsConfigDict(env_prefix="AIRPEFT_DEVICE_", extra="forbid", frozen=True)

    base: str = "minilm"
    heldout: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    heldout_limit: int = Field(256, ge=1, le=100_000)
    port: int = Field(0, ge=0, le=65_535)
    threads: int = Field(1, ge=1, le=256)
    max_length: int = Field(128, ge=4, le=4096)
    quality_tolerance: float = Field(0.05, ge=0.0, le=1.0)
    health_seconds: float = Field(300.0, gt=0.0)
    reconnect_seconds: tuple[float, float] = (0.5, 60.0)
    later_seconds: tuple[float, float] = (30.0, 3600.0)
    time_zone: str = ""
    update_lock: tuple[str, ...] = ()
    lock_seconds: float = Field(30.0, gt=0.0)
    min_battery_percent: int = Field(0, ge=0, le=100)
    watch_seconds: float = Field(60.0, ge=0.0, le=86_400.0)
    max_temperature_celsius: float | None = Field(None, gt=0.0)
    max_load_rise: float | None = Field(None, gt=0.0)
    sources: tuple[str, ...] = ("fleet",)
    source_authority: Path | None = None
    mirror_seconds: float = Field(300.0, gt=0.0)
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        if name:
            try:
                ZoneInfo(name)
            except (ZoneInfoNotFoundError, ValueError, OSError):
                raise ValueError("not the name of a time zone, such as Europe/Berlin") from None
        return name

    @property
    def watch(self) -> WatchPolicy:
        """What counts as worse after an install."""
        heat, rise = self.max_temperature_celsius, self.max_load_rise
        return WatchPolicy(
            seconds=self.watch_seconds,
            max_temperature_celsius=math.inf if heat is None else heat,
            max_load_rise=math.inf if rise is None else rise,
        )

    @property
    def zone(self) -> ZoneInfo | None:
        """The device's time zone; None: the system's."""
        return ZoneInfo(self.time_zone) if self.time_zone else None

    @classmethod
    def read(cls, home: Path, flags: Mapping[str, Any]) -> DeviceSettings:
        """The settings of one start.

        Args:
            home: where ``device.toml`` may lie.
            flags: what was given on the command line; None means not given.

        Raises:
            DeviceError: naming the setting, the value and what is allowed.
        """
        file = home / "device.toml"

        class _Here(cls):  # type: ignore[valid-type, misc]
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, file)

        try:
            found = _Here(**{key: value for key, value in flags.items() if value is not None})
            return cast("DeviceSettings", found)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise DeviceError(
                f"setting {name!r}: {first['msg']} (given: {first.get('input')!r}); it comes from "
                f"a flag, AIRPEFT_DEVICE_{name.upper()} or {file}"
            ) from None
        except ValueError as error:
            raise DeviceError(f"{file} is not TOML: {error}") from None
