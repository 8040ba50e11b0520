"""Archives byte by byte, for tests: everything a zip can say, truly or not, and packages that are valid."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from dataclasses import dataclass, field, replace
from typing import Any, Final

Fields = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One entry; what is not given is as a correct writer would have it.

    Args:
        payload: the compressed bytes as they stand in the archive.
        both, local, central: header fields by name, instead of the right ones.
        descriptor: None, or the bytes behind the content; `signed()` and `plain()` make right ones.
        before: bytes in front of the local header that no record mentions.
    """

    name: str | bytes
    data: bytes = b""
    method: int = 8
    payload: bytes | None = None
    flags: int | None = None
    made_by: int = 3 << 8 | 20
    attributes: int | None = None
    both: Fields = field(default_factory=dict)
    local: Fields = field(default_factory=dict)
    central: Fields = field(default_factory=dict)
    local_name: bytes | None = None
    local_extra: bytes = b""
    central_extra: bytes = b""
    comment: bytes = b""
    descriptor: bytes | None = None
    before: bytes = b""
    in_directory: bool = True
    in_body: bool = True

    @property
    def raw_name(self) -> bytes:
        return self.name if isinstance(self.name, bytes) else self.name.encode()

    @property
    def content(self) -> bytes:
        if self.payload is not None:
            return self.payload
        return deflate(self.data) if self.method == 8 else self.data

    def fields(self) -> Fields:
        flags = self.flags
        if flags is None:
            flags = 0 if self.raw_name.isascii() else 1 << 11
        return {
            "version": 20, "flags": flags, "method": self.method, "time": 0, "date": 33,
            "crc": zlib.crc32(self.data), "compressed": len(self.content), "size": len(self.data),
        }  # fmt: skip


def deflate(data: bytes) -> bytes:
    deflater = zlib.compressobj(6, zlib.DEFLATED, -15)
    return deflater.compress(data) + deflater.flush()


def plain_descriptor(part: Part) -> bytes:
    fields = part.fields()
    return struct.pack("<3I", fields["crc"], fields["compressed"], fields["size"])


def streamed(part: Part, *, signed: bool = True, known: bool = False) -> Part:
    """The entry as a writer leaves it that cannot go back: sizes behind the content."""
    descriptor = (b"PK\x07\x08" if signed else b"") + plain_descriptor(part)
    local = {} if known else {"crc": 0, "compressed": 0, "size": 0}
    flags = part.fields()["flags"] | 1 << 3
    return replace(part, flags=flags, descriptor=descriptor, local=local)


def folder(name: str, **fields: Any) -> Part:
    return Part(name=name, method=0, attributes=0o40755 << 16 | 0x10, **fields)


def extra(kind: int, data: bytes = b"") -> bytes:
    return struct.pack("<2H", kind, len(data)) + data


def forge(*parts: Part, end: Fields | None = None, before_end: bytes = b"", comment: bytes = b"") -> bytes:
    """The archive of `parts`; `end` are fields of the end record by name, instead of the right ones."""
    body = bytearray()
    directory = bytearray()
    offset = 0
    count = 0
    for part in parts:
        if part.in_body:
            body += part.before
            offset = len(body)
            body += _local(part)
        if part.in_directory:
            directory += _central(part, offset)
            count += 1
    fields = {
        "disk": 0, "directory_disk": 0, "disk_count": count, "count": count, "size": len(directory),
        "offset": len(body), "comment": len(comment), **(end or {}),
    }  # fmt: skip
    return (
        bytes(body + directory + before_end) + struct.pack("<4s4H2IH", b"PK\5\6", *fields.values()) + comment
    )


def _local(part: Part) -> bytes:
    fields = {**part.fields(), **part.both, **part.local}
    name = part.raw_name if part.local_name is None else part.local_name
    return (
        struct.pack("<4s5H3I2H", b"PK\3\4", *fields.values(), len(name), len(part.local_extra))
        + name
        + part.local_extra
        + part.content
        + (part.descriptor or b"")
    )


def _central(part: Part, offset: int) -> bytes:
    fields = {**part.fields(), "disk": 0, "offset": offset, **part.both, **part.central}
    attributes = part.attributes if part.attributes is not None else 0o100644 << 16
    disk, offset = fields.pop("disk"), fields.pop("offset")
    return (
        struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", part.made_by, *fields.values(), len(part.raw_name),
            len(part.central_extra), len(part.comment), disk, 0, attributes, offset,
        )
        + part.raw_name + part.central_extra + part.comment
    )  # fmt: skip


# --- packages -----------------------------------------------------------------------------------------------

JOB: Final = Part(name="files/job.json", data=b'{"price": 300, "price of": "price", "prices": [300, 300]}\n')
NOTE: Final = Part(name="files/rest/note.txt", data=b"stored as it is\n", method=0)
FILES: Final = (JOB, NOTE)
SHA: Final = {part.raw_name.decode(): hashlib.sha256(part.data).hexdigest() for part in FILES}


def change(part: Part, **keys: Any) -> dict[str, Any]:
    """What a manifest says of a file that is new."""
    path = part.raw_name.decode().removeprefix("files/")
    digest = hashlib.sha256(part.data).hexdigest()
    return {"path": path, "op": "new", "sha256": digest, "size": len(part.data), **keys}


def manifest(*parts: Part, **keys: Any) -> dict[str, Any]:
    """A valid manifest that lists `parts`, with other values for `keys`."""
    return {
        "schema": "asyncsup.patch/1", "name": "pricing-rules", "version": "2.3.0", "build": 300,
        "kind": "warm", "targets": ["pricer"], "regions": ["us-east-1"],
        "files": [change(part) for part in parts], **keys,
    }  # fmt: skip


def manifest_part(*parts: Part, **keys: Any) -> Part:
    return Part(name="manifest.json", data=json.dumps(manifest(*parts, **keys), ensure_ascii=False).encode())


def native(*parts: Part, **keys: Any) -> bytes:
    """A package of `parts`, which its manifest lists; valid if they are."""
    return forge(manifest_part(*parts, **keys), *parts)


def prototype_manifest(**keys: Any) -> bytes:
    value: dict[str, Any] = {
        "justres": True, "region": "us-east-1", "build": "300",
        "newfiles": [{"name": "res.json", "path": "/work/rest/"}],
        "modfiles": [{"name": "job.json", "path": "/work/"}],
        "delfiles": [{"name": "lib.txt", "path": "/work/libs/"}],
        **keys,
    }  # fmt: skip
    return json.dumps({key: item for key, item in value.items() if item is not None}).encode()


def prototype(raw: bytes | None = None, *, also: tuple[Part, ...] = (), without: str = "") -> bytes:
    """A package as the prototype's author made them on MS-DOS, with folder entries."""
    dos: dict[str, Any] = {"made_by": 20, "attributes": 0x20}
    parts = (
        *(Part(name=name, method=0, made_by=20, attributes=0x10)
          for name in ("patch/", "patch/del/", "patch/mod/", "patch/new/")),
        Part(name="patch/manifest.json", data=prototype_manifest() if raw is None else raw, **dos),
        Part(name="patch/mod/job.json", data=b'{"job": 2}', method=0, **dos),
        Part(name="patch/new/res.json", data=b'{"res": "res res res res res"}', **dos),
    )  # fmt: skip
    return forge(*(part for part in parts if part.name != without), *also)


# Written by java.util.zip.ZipOutputStream: data descriptors, UTF-8 names, deflated folders, a timestamp.
JAVA: Final = base64.b64decode(
    "UEsDBBQACAgIAKS8d10AAAAAAAAAAAAAAAANAAAAbWFuaWZlc3QuanNvbn2PS27DMAxE9z1FoHU+kqyP1asUWVAiFTuNHUNykrZB"
    "DtRz9GKV3E1WXRHzhpgh7yyHjgZgrysG+XMM+TJtJ5hDtxNsvWIjDFS9I1xhMwBShVdKuT+PlS9L/tKfsKiG86Le+7EKdoM0VHeG"
    "dKA5F/TGptQHSmxfcKJDyfjDl7whyPNGLE7sT7Twlzsrp3Q1LP18593x7LfHXIrL0nmqeKRbFbkDqU0FwaME1XDHhQ3IraKgvedB"
    "RE0korMtGh5d28oIwQbJvQ9oNYJQsQyzpPVf9efGPNZPF0wn6Mft/DH/044atSQvEFpsJDQNOokghRYUQrSOg3QWySgpLHcKhVFW"
    "g3JGogBO+NRuH/vHyy9QSwcI21El5Q8BAACeAQAAUEsDBBQACAgIAKS8d10AAAAAAAAAAAAAAAAGAAAAZmlsZXMvAwBQSwcIAAAA"
    "AAIAAAAAAAAAUEsDBBQACAgIAKS8d10AAAAAAAAAAAAAAAALAAAAZmlsZXMvcsOpcy8DAFBLBwgAAAAAAgAAAAAAAABQSwMEFAAI"
    "CAgAqrFuVwAAAAAAAAAAAAAAABMACQBmaWxlcy9yw6lzL2pvYi5qc29uVVQFAAEA8VNlq1YqKMpMTlWyUjA2MNBRgPAU8tOAAlCZ"
    "Wi4AUEsHCOjjBtQbAAAAJAAAAFBLAwQKAAAIAACkvHdd4pxTpQcAAAAHAAAADwAAAGZpbGVzL3BsYWluLnR4dHN0b3JlZApQSwEC"
    "FAAUAAgICACkvHdd21El5Q8BAACeAQAADQAAAAAAAAAAAAAAAAAAAAAAbWFuaWZlc3QuanNvblBLAQIUABQACAgIAKS8d10AAAAA"
    "AgAAAAAAAAAGAAAAAAAAAAAAAAAAAEoBAABmaWxlcy9QSwECFAAUAAgICACkvHddAAAAAAIAAAAAAAAACwAAAAAAAAAAAAAAAACA"
    "AQAAZmlsZXMvcsOpcy9QSwECFAAUAAgICACqsW5X6OMG1BsAAAAkAAAAEwAJAAAAAAAAAAAAAAC7AQAAZmlsZXMvcsOpcy9qb2Iu"
    "anNvblVUBQABAPFTZVBLAQIKAAoAAAgAAKS8d13inFOlBwAAAAcAAAAPAAAAAAAAAAAAAAAAACACAABmaWxlcy9wbGFpbi50eHRQ"
    "SwUGAAAAAAUABQAvAQAAVAIAAAAA"
)
# Written by `jar -cfM`: data descriptors, and the mark 0xCAFE on the first entry.
JAR: Final = base64.b64decode(
    "UEsDBBQACAgIAIMYIlwAAAAAAAAAAAAAAAANAAQAbWFuaWZlc3QuanNvbv7KAAAlj82OwjAMhO88Bcp5C0n/y6usODiOQ9OlaZWk"
    "IBbx7ht3T9Z8MxrbbxFxpBnE5SggvjzGbT2tkHA8K/F1FB5mYm+CUMxgiNmDQnSLZ7xn9ObuJqtKyqx+nGchnhBmdhOEG6WY0bdY"
    "g0MK4ppxoFvu+MdbLAhiKtTuWHennR/eIl8yclmgmM7Tok9TzItzaFkZe3qyiCOUTcsAtSmhruQgVYdGdjVho7VEZRsiZYeuN620"
    "Q9+XFrDDUmqNpmsMqNrm0e5t7pdfrtrP9XP4A1BLBwiRi+E+zgAAACABAABQSwMECgAACAAAgxgiXAAAAAAAAAAAAAAAAAYAAABm"
    "aWxlcy9QSwMECgAACAAAgxgiXAAAAAAAAAAAAAAAAAsAAABmaWxlcy9yZXN0L1BLAwQUAAgICACDGCJcAAAAAAAAAAAAAAAAEwAA"
    "AGZpbGVzL3Jlc3Qvam9iLmpzb26rViooykxOVbJSMDYw0FGA8BTy04ACUJlaLgBQSwcI6OMG1BsAAAAkAAAAUEsBAhQAFAAICAgA"
    "gxgiXJGL4T7OAAAAIAEAAA0ABAAAAAAAAAAAAAAAAAAAAG1hbmlmZXN0Lmpzb27+ygAAUEsBAgoACgAACAAAgxgiXAAAAAAAAAAA"
    "AAAAAAYAAAAAAAAAAAAAAAAADQEAAGZpbGVzL1BLAQIKAAoAAAgAAIMYIlwAAAAAAAAAAAAAAAALAAAAAAAAAAAAAAAAADEBAABm"
    "aWxlcy9yZXN0L1BLAQIUABQACAgIAIMYIlzo4wbUGwAAACQAAAATAAAAAAAAAAAAAAAAAFoBAABmaWxlcy9yZXN0L2pvYi5qc29u"
    "UEsFBgAAAAAEAAQA7QAAALYBAAAAAA=="
)
# Written by 7-Zip 26.01 in the prototype's layout: sorted, NTFS times, Unix modes beside DOS attributes.
SEVEN_ZIP: Final = base64.b64decode(
    "UEsDBBQAAAAAAIMYIlwAAAAAAAAAAAAAAAAGAAAAcGF0Y2gvUEsDBBQAAAAAAIMYIlwAAAAAAAAAAAAAAAAKAAAAcGF0Y2gvZGVs"
    "L1BLAwQUAAAACACDGCJcjYmFhHoAAADOAAAAEwAAAHBhdGNoL21hbmlmZXN0Lmpzb25tjcEOgjAQRP9lzkAx3vgV46FNV20trelu"
    "gwnh313iyeBx3uTNrIiNpRJjktqoQ6V7KBkTGvdkWfoTOrgWkld2HkdNmZZbSLtyWZHtTNrowiBv0fZl5aHALKU+jWIx2K4d5uIP"
    "UixuiKxvv9ZX8JQOQgru34ti3qXtA1BLAwQUAAAAAACDGCJcAAAAAAAAAAAAAAAACgAAAHBhdGNoL21vZC9QSwMECgAAAAAAgxgi"
    "XCgn730LAAAACwAAABIAAABwYXRjaC9tb2Qvam9iLmpzb257ImpvYiI6IDJ9ClBLAwQUAAAAAACDGCJcAAAAAAAAAAAAAAAACgAA"
    "AHBhdGNoL25ldy9QSwMEFAAAAAgAgxgiXKbMXVYaAAAAJAAAABEAAABwYXRjaC9uZXcvcmVzLnR4dH3EoQ0AAAwCML8r9htB4Aj/"
    "Cz6goo7An18BUEsBAj8DFAAAAAAAgxgiXAAAAAAAAAAAAAAAAAYAJAAAAAAAAAAQgO1BAAAAAHBhdGNoLwoAIAAAAAAAAQAYAACX"
    "2HSUe9wBAAAAAAAAAAAAAAAAAAAAAFBLAQI/AxQAAAAAAIMYIlwAAAAAAAAAAAAAAAAKACQAAAAAAAAAEIDtQSQAAABwYXRjaC9k"
    "ZWwvCgAgAAAAAAABABgAAJfYdJR73AEAAAAAAAAAAAAAAAAAAAAAUEsBAj8DFAAAAAgAgxgiXI2JhYR6AAAAzgAAABMAJAAAAAAA"
    "AAAggKSBTAAAAHBhdGNoL21hbmlmZXN0Lmpzb24KACAAAAAAAAEAGAAAl9h0lHvcAQAAAAAAAAAAAAAAAAAAAABQSwECPwMUAAAA"
    "AACDGCJcAAAAAAAAAAAAAAAACgAkAAAAAAAAABCA7UH3AAAAcGF0Y2gvbW9kLwoAIAAAAAAAAQAYAACX2HSUe9wBAAAAAAAAAAAA"
    "AAAAAAAAAFBLAQI/AwoAAAAAAIMYIlwoJ+99CwAAAAsAAAASACQAAAAAAAAAIICkgR8BAABwYXRjaC9tb2Qvam9iLmpzb24KACAA"
    "AAAAAAEAGAAAl9h0lHvcAQAAAAAAAAAAAAAAAAAAAABQSwECPwMUAAAAAACDGCJcAAAAAAAAAAAAAAAACgAkAAAAAAAAABCA7UFa"
    "AQAAcGF0Y2gvbmV3LwoAIAAAAAAAAQAYAACX2HSUe9wBAAAAAAAAAAAAAAAAAAAAAFBLAQI/AxQAAAAIAIMYIlymzF1WGgAAACQA"
    "AAARACQAAAAAAAAAIICkgYIBAABwYXRjaC9uZXcvcmVzLnR4dAoAIAAAAAAAAQAYAACX2HSUe9wBAAAAAAAAAAAAAAAAAAAAAFBL"
    "BQYAAAAABwAHAJgCAADLAQAAAAA="
)
