"""The one error hierarchy.

The class is for ``except``; the ``code`` is for the wire, ``--json`` and log searches: it is stable, never
renamed and never reused. ``exit_status`` is what the command line ends with. The control server turns an
error into a JSON-RPC error object in one place (`control.py`), the client turns it back in one place
(`client.py`).
"""

from __future__ import annotations

from typing import Any, ClassVar


class AsyncsupError(Exception):
    """Something was wrong in a way asyncsup foresaw; the message says what, where, and what would do.

    Args:
        message: one sentence or two for a person. Names of files in it need not be text: what is none is
            written out (``\\udcff``), as an error has to fit into JSON.
        code: a more specific stable code than the class's own.
        details: JSON values for a program: the field, the path, the value at fault.
    """

    code: ClassVar[str] = "internal"
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, code: str | None = None, **details: Any) -> None:
        message = message.encode("utf-8", "backslashreplace").decode()
        super().__init__(message)
        self.message = message
        self.error_code = code or self.code
        self.details = details


class UsageError(AsyncsupError):
    """The caller asked for something that makes no sense as asked; nothing was changed."""

    code = "usage"
    exit_status = 2


class RequestError(AsyncsupError):
    """A control request was not well formed (unknown method, wrong parameter type); nothing was changed."""

    code = "request.invalid"
    exit_status = 2


class ConfigError(AsyncsupError):
    """The configuration has errors. ``details["problems"]`` lists every one of them; nothing was started."""

    code = "config.invalid"
    exit_status = 5


class StateLockedError(AsyncsupError):
    """Another supervisor owns the state directory; nothing was changed."""

    code = "supervisor.already_running"
    exit_status = 8


class StateError(AsyncsupError):
    """The state directory is damaged or cannot be used; nothing was changed."""

    code = "state.invalid"


class ReexecError(AsyncsupError):
    """The supervisor was not replaced: the new program would not start. The old one runs on."""

    code = "reexec.failed"


class SupervisorUnreachableError(AsyncsupError):
    """No supervisor answers at the endpoint; the request may be repeated."""

    code = "supervisor.unreachable"
    exit_status = 7


class ShuttingDownError(AsyncsupError):
    """The supervisor is ending and takes no new work; nothing was changed."""

    code = "supervisor.shutting_down"
    exit_status = 8


class NotAllowedError(AsyncsupError):
    """The caller may not do this; nothing was changed."""

    code = "not_allowed"
    exit_status = 6


class KeysError(AsyncsupError):
    """Something is wrong with a CURVE key, or with a file of them; nothing was changed."""

    code = "keys.invalid"
    exit_status = 2


class TimeoutExpiredError(AsyncsupError):
    """The deadline the caller gave passed first. The message says what had been reached by then."""

    code = "timeout"
    exit_status = 124


class CancelledByRequestError(AsyncsupError):
    """A later request (usually `stop`) pre-empted this one, or its client gave up."""

    code = "request.cancelled"


class TargetNotFoundError(AsyncsupError):
    """The request named a target or instance the supervisor does not have; nothing was changed."""

    code = "target.not_found"
    exit_status = 4


class TargetBusyError(AsyncsupError):
    """Another operation holds the target and the caller did not want to wait; the message names it."""

    code = "target.busy"
    exit_status = 8


class TargetNotRunningError(AsyncsupError):
    """The request needs a running instance and there is none; nothing was changed."""

    code = "target.not_running"
    exit_status = 3


class SpawnError(AsyncsupError):
    """The program of a target could not be executed; the message says why."""

    code = "target.spawn_failed"


class SocketError(AsyncsupError):
    """A managed socket could not be bound, or its settings not be changed; all else was done."""

    code = "socket.failed"


class CgroupUnavailableError(SpawnError):
    """A target asks for a control group, or for a limit that needs one, and the host does not allow it.

    Nothing was started; `supervisor.info` says which isolation there is.
    """

    code = "cgroup.unavailable"


class StartFailedError(AsyncsupError):
    """An instance ended, or did not become ready, while its start was being waited for."""

    code = "target.start_failed"


class NoCapacityError(AsyncsupError):
    """An instance may not be stopped, because no more than `patch.min_available` are ready; it runs on."""

    code = "target.no_capacity"


class StopFailedError(AsyncsupError):
    """Processes of a target were left after the last escalation; the message says which."""

    code = "target.stop_failed"


class HandoverFailedError(AsyncsupError):
    """An instance could not hand what it has over to its successor; it goes on with it."""

    code = "handover.failed"


class ReloadFailedError(AsyncsupError):
    """A target answered a reload with a failure, or not at all; it keeps running with what it had."""

    code = "target.reload_failed"


class IllegalTransitionError(AsyncsupError):
    """An event arrived that the state has no cell for; the state is unchanged."""

    code = "lifecycle.illegal_transition"


class PatchError(AsyncsupError):
    """Base of everything that can go wrong with a patch."""

    code = "patch.failed"


class PatchRefusedError(PatchError):
    """A gate refused the patch; nothing was touched. The code names the gate (``gate.region`` ...)."""

    code = "gate.refused"
    exit_status = 20


class PatchMalformedError(PatchError):
    """The package is not a valid patch, or a checksum or signature is wrong; nothing was touched.

    The code names the fault: ``zip.*`` for the archive, ``manifest.*`` for the manifest, ``digest.*`` for
    checksums, ``trust.*`` for signatures.
    """

    code = "package.malformed"
    exit_status = 21


class PatchTargetRefusedError(PatchError):
    """A target said no, asked to wait for longer than allowed, or did not answer; nothing changed."""

    code = "patch.target_refused"
    exit_status = 22


class PatchRolledBackError(PatchError):
    """The patch was applied and undone: everything is as it was before. ``__cause__`` says why."""

    code = "patch.rolled_back"
    exit_status = 23


class PatchUndecidedError(PatchError):
    """The patch failed after the switch and, with ``rollback = "manual"``, was left as it is: an operator
    decides. ``__cause__`` says what failed.
    """

    code = "patch.undecided"
    exit_status = 25


class RollbackFailedError(PatchError):
    """Undoing failed as well. The files are wholly one build; the message says which process is not well."""

    code = "patch.rollback_failed"
    exit_status = 24


class PatchNotFoundError(PatchError):
    """The request named a patch or transaction that is not known; nothing was changed."""

    code = "patch.not_found"
    exit_status = 4


class RemoteError(AsyncsupError):
    """An error the supervisor answered with; carries its code, exit status and details unchanged."""

    def __init__(self, message: str, *, code: str, exit_status: int, **details: Any) -> None:
        super().__init__(message, code=code, **details)
        self.remote_exit_status = exit_status


class PatchBuildError(PatchError):
    """No package can be made of what was given; the output is as it was before.

    The code names the reason: ``build.empty``, ``build.path``, ``build.file_type`` ...
    """

    code = "build.failed"


class AllowedSignersError(AsyncsupError):
    """The file of allowed signers cannot be used, so no signature was believed; nothing was changed.

    ``details["problems"]`` has every line that is wrong.
    """

    code = "trust.allowed_signers"
    exit_status = 5


class TrustUnavailableError(AsyncsupError):
    """Signatures are asked for, and the `cryptography` package that verifies them is not there."""

    code = "trust.unavailable"
    exit_status = 5


class PatchSignError(PatchError):
    """The package was not signed; it is as it was before.

    The code names the reason: ``sign.key``, ``sign.name``, ``sign.prototype`` ...
    """

    code = "sign.failed"
