"""The tables of the state database in SQL, and the upgrade from older versions.

Flags are 0 or 1, times are seconds since 1970, labels are JSON objects of strings.

- ``meta``: single values: ``client_id`` (the controller's name at the broker) and ``changes``, which grows with every
  change that the controller must act upon.
- ``device``: ``managed`` once a rollout wanted something of it: before, nothing is published for it, and what it has it
  keeps. A removed one keeps its row: its ``desired_version`` must never fall, and its retained desired state must be
  cleared at the broker.
- ``desired_model``: one model that a device shall run; ``size`` is of the manifest in bytes, ``soak`` the seconds for
  which it waits for calls of users; ``rival`` is another bundle of the release that it measures beside it; ``ordered``
  is the desired version with which it was asked for last, 0 where an earlier Kedge did not note it.
- ``desired_shadow``: a bundle that shall run beside a desired one, see :func:`kedge.fleet.rollouts.shadow` and
  :mod:`kedge.fleet.shadows`.
- ``sample_request``, ``sample_part``: a request for samples, and one device's part of it, see
  :mod:`kedge.fleet.samples`; ``rid`` is its number on the wire.
- ``device_state``: what a device said last; ``reported`` is the message as it came, ``told_target`` the target in it,
  ``refused_…`` the desired state that it did not take, ``namesake`` the boot of another device of its name.
- ``reported_model``: the models of that message, taken apart, so that a rollout is judged without reading messages;
  ``served_calls`` is NULL where the device does not say what attests that it serves.
- ``telemetry``: a short history; ``document`` is the message as it came.
- ``call_figures``: telemetry summed by device, model and bundle, see :mod:`kedge.fleet.call_figures`; ``edition`` grows
  with each change of ``document``, and ``shadow`` is the bundle whose shadow the document tells of.
- ``drift_sketch``: what a device's samples of one bundle were like, see :mod:`kedge.fleet.drift`.
- ``latency``: what one call of a bundle took on a device when it proved it there, in milliseconds; the latest proof's.
  ``target`` is the device's at that time, ``files`` the digest of the file that the runtime opens.
- ``release``, ``bundle``: what is published; ``statement`` is the signed list of a release's bundles, see
  :mod:`kedge_protocol.trust`; a bundle's ``digest`` and ``size`` are of its manifest, ``drift`` is its baseline.
  Of the bundles of one target ``preference`` 0 is the compiler's choice; ``max_latency`` is the budget's, in ms.
- ``refused_bundle``: a bundle that a device tried and refused, at which stage and why; see :mod:`.candidates`.
- ``assignment``: a device in a rollout whose release holds several bundles for its target: whether it waits for figures
  of others, measures two, or has one, and why; see :mod:`kedge.fleet.assigning`. ``rival`` is what it measures, or
  measured, beside ``rollout_device.digest``.
- ``blob``, ``bundle_blob``: what devices may ask for; a bundle's manifest and configuration are among its blobs.
- ``rollout``: ``state`` is ``active``, or ``superseded`` once each of its devices was taken over by a newer one.
- ``rollout_device``: a device's part. ``digest`` is NULL where the model is taken away; ``previous`` is what the device
  was to have before, NULL for nothing; ``bytes_before`` is what it had been sent of the bundle's blobs;
  ``superseded_by`` is the newer rollout that wants something else of it.
- ``transfer``: what one device was sent of one blob (``kind`` ``blob``) or of its map (``map``). ``served`` and
  ``have`` are bitmaps: blocks served ever, and blocks that the device ever said it had finished.
- ``command``: something to ask of a device once, and its answer.
- ``audit``: see :mod:`kedge.fleet.audit`; entries are appended and never changed.
- ``rollout_stage``: what a staged rollout has more: its policy as JSON and its state, see
  :class:`kedge.fleet.staged.states.State`; ``live`` is 2 while it goes on, 1 where it has ended and devices may still
  answer or come, 0 otherwise; ``revert_id`` is the rollout that takes it back; ``edition`` grows with each change of it
  or of its members.
- ``rollout_member``: a device in a staged rollout, in the order in which devices are told, see
  :class:`kedge.fleet.staged.states.Member`. Its ``rollout_device`` comes when it is told.
- ``gate_result``: what the gates said last, by wave.
"""

from __future__ import annotations

VERSION = 8
"""Stored as SQLite's ``user_version``. 2 has ``latency`` more than 1; 3 has ``reported_model``, ``command`` and the
columns ``told_target``, ``refused_…``, ``namesake`` and ``superseded_by``; 4 has ``audit`` and ``release.statement``;
5 has ``call_figures``, ``rollout_stage``, ``rollout_member``, ``gate_result`` and the columns ``soak`` and
``served_…``; 6 has ``sample_request``, ``sample_part``, ``assignment``, ``refused_bundle``, several bundles of a target
and the columns ``rival…``; 7 has the column ``ordered``; 8 has ``edition`` and ``shadow`` of ``call_figures``."""

TABLES = """
CREATE TABLE IF NOT EXISTS meta (
    key VARCHAR NOT NULL PRIMARY KEY,
    value VARCHAR NOT NULL
);
CREATE TABLE IF NOT EXISTS device (
    id INTEGER NOT NULL PRIMARY KEY,
    name VARCHAR NOT NULL UNIQUE,
    target VARCHAR NOT NULL,
    labels JSON NOT NULL,
    added_at DOUBLE NOT NULL,
    desired_version INTEGER NOT NULL,
    managed BOOLEAN NOT NULL,
    removed BOOLEAN NOT NULL
);
CREATE TABLE IF NOT EXISTS desired_model (
    device_id INTEGER NOT NULL REFERENCES device (id),
    model VARCHAR NOT NULL,
    digest VARCHAR NOT NULL,
    size INTEGER NOT NULL,
    soak DOUBLE NOT NULL DEFAULT 0,
    rival VARCHAR,
    rival_size INTEGER NOT NULL DEFAULT 0,
    ordered INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (device_id, model)
);
CREATE TABLE IF NOT EXISTS desired_shadow (
    device_id INTEGER NOT NULL REFERENCES device (id),
    model VARCHAR NOT NULL,
    digest VARCHAR NOT NULL,
    size INTEGER NOT NULL,
    share DOUBLE NOT NULL,
    memory_bytes INTEGER NOT NULL,
    PRIMARY KEY (device_id, model)
);
CREATE TABLE IF NOT EXISTS device_state (
    device_id INTEGER NOT NULL PRIMARY KEY REFERENCES device (id),
    online BOOLEAN NOT NULL,
    boot_id VARCHAR NOT NULL,
    session INTEGER NOT NULL,
    seen_at DOUBLE NOT NULL,
    reported BLOB,
    reported_boot_id VARCHAR NOT NULL,
    reported_seq INTEGER NOT NULL,
    answered_version INTEGER NOT NULL,
    told_target VARCHAR,
    refused_version INTEGER,
    refused_reason VARCHAR,
    refused_came VARCHAR,
    refused_held VARCHAR,
    namesake VARCHAR
);
CREATE TABLE IF NOT EXISTS reported_model (
    device_id INTEGER NOT NULL REFERENCES device (id),
    model VARCHAR NOT NULL,
    state VARCHAR NOT NULL,
    desired VARCHAR,
    digest VARCHAR,
    version VARCHAR,
    previous VARCHAR,
    proved BOOLEAN NOT NULL,
    blocks_done INTEGER NOT NULL,
    blocks_total INTEGER NOT NULL,
    bytes_received INTEGER NOT NULL,
    failure_digest VARCHAR,
    failure_stage VARCHAR,
    failure_reason VARCHAR,
    detail VARCHAR,
    served_calls INTEGER,
    served_golden INTEGER,
    served_problem VARCHAR,
    PRIMARY KEY (device_id, model)
);
CREATE TABLE IF NOT EXISTS telemetry (
    id INTEGER NOT NULL PRIMARY KEY,
    device_id INTEGER NOT NULL REFERENCES device (id),
    at DOUBLE NOT NULL,
    document BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS ix_telemetry_device_id ON telemetry (device_id);
CREATE TABLE IF NOT EXISTS call_figures (
    device_id INTEGER NOT NULL REFERENCES device (id),
    model VARCHAR NOT NULL,
    digest VARCHAR NOT NULL,
    since DOUBLE NOT NULL,
    until DOUBLE NOT NULL,
    edition INTEGER NOT NULL DEFAULT 0,
    shadow VARCHAR,
    document BLOB NOT NULL,
    PRIMARY KEY (device_id, model, digest)
);
CREATE INDEX IF NOT EXISTS ix_call_figures_shadow ON call_figures (device_id, model) WHERE shadow IS NOT NULL;
CREATE TABLE IF NOT EXISTS drift_sketch (
    device_id INTEGER NOT NULL REFERENCES device (id),
    model VARCHAR NOT NULL,
    digest VARCHAR NOT NULL,
    since DOUBLE NOT NULL,
    seen_at DOUBLE NOT NULL,
    fresh VARCHAR NOT NULL,
    before VARCHAR NOT NULL,
    PRIMARY KEY (device_id, model)
);
CREATE TABLE IF NOT EXISTS sample_request (
    id INTEGER NOT NULL PRIMARY KEY,
    rid VARCHAR NOT NULL UNIQUE,
    model VARCHAR NOT NULL,
    choice VARCHAR NOT NULL,
    count INTEGER NOT NULL,
    below DOUBLE NOT NULL,
    seconds DOUBLE NOT NULL,
    asked_at DOUBLE NOT NULL,
    ends_at DOUBLE NOT NULL,
    state VARCHAR NOT NULL
);
CREATE TABLE IF NOT EXISTS sample_part (
    request_id INTEGER NOT NULL REFERENCES sample_request (id),
    device_id INTEGER NOT NULL REFERENCES device (id),
    count INTEGER NOT NULL,
    max_bytes INTEGER NOT NULL,
    state VARCHAR NOT NULL,
    detail VARCHAR NOT NULL,
    seen INTEGER NOT NULL,
    kept INTEGER NOT NULL,
    samples INTEGER NOT NULL,
    size INTEGER NOT NULL,
    PRIMARY KEY (request_id, device_id)
);
CREATE INDEX IF NOT EXISTS ix_sample_part_device_id ON sample_part (device_id);
CREATE TABLE IF NOT EXISTS latency (
    device_id INTEGER NOT NULL REFERENCES device (id),
    bundle VARCHAR NOT NULL,
    files VARCHAR NOT NULL,
    target VARCHAR NOT NULL,
    p50_ms DOUBLE NOT NULL,
    p95_ms DOUBLE NOT NULL,
    calls INTEGER NOT NULL,
    at DOUBLE NOT NULL,
    PRIMARY KEY (device_id, bundle)
);
CREATE TABLE IF NOT EXISTS release (
    id INTEGER NOT NULL PRIMARY KEY,
    name VARCHAR NOT NULL,
    version VARCHAR NOT NULL,
    digest VARCHAR NOT NULL,
    published_at DOUBLE NOT NULL,
    statement BLOB,
    UNIQUE (name, version)
);
CREATE TABLE IF NOT EXISTS bundle (
    id INTEGER NOT NULL PRIMARY KEY,
    release_id INTEGER NOT NULL REFERENCES release (id),
    target VARCHAR NOT NULL,
    digest VARCHAR NOT NULL,
    size INTEGER NOT NULL,
    backend VARCHAR NOT NULL,
    precision VARCHAR NOT NULL,
    drift VARCHAR,
    preference INTEGER NOT NULL DEFAULT 0,
    max_latency DOUBLE,
    UNIQUE (release_id, target, backend)
);
CREATE INDEX IF NOT EXISTS ix_bundle_digest ON bundle (digest);
CREATE TABLE IF NOT EXISTS blob (
    digest VARCHAR NOT NULL PRIMARY KEY,
    size INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS bundle_blob (
    bundle_id INTEGER NOT NULL REFERENCES bundle (id),
    digest VARCHAR NOT NULL REFERENCES blob (digest),
    PRIMARY KEY (bundle_id, digest)
);
CREATE TABLE IF NOT EXISTS rollout (
    id INTEGER NOT NULL PRIMARY KEY,
    model VARCHAR NOT NULL,
    version VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    state VARCHAR NOT NULL,
    started_at DOUBLE NOT NULL,
    selected JSON NOT NULL,
    reverts INTEGER REFERENCES rollout (id)
);
CREATE INDEX IF NOT EXISTS ix_rollout_model ON rollout (model);
CREATE TABLE IF NOT EXISTS rollout_device (
    rollout_id INTEGER NOT NULL REFERENCES rollout (id),
    device_id INTEGER NOT NULL REFERENCES device (id),
    digest VARCHAR,
    previous VARCHAR,
    previous_size INTEGER NOT NULL,
    desired_version INTEGER NOT NULL,
    bytes_before INTEGER NOT NULL,
    superseded_by INTEGER REFERENCES rollout (id),
    PRIMARY KEY (rollout_id, device_id)
);
CREATE INDEX IF NOT EXISTS ix_rollout_device_device_id ON rollout_device (device_id);
CREATE TABLE IF NOT EXISTS assignment (
    rollout_id INTEGER NOT NULL REFERENCES rollout (id),
    device_id INTEGER NOT NULL REFERENCES device (id),
    target VARCHAR NOT NULL,
    state VARCHAR NOT NULL,
    rival VARCHAR,
    reason VARCHAR NOT NULL,
    soak DOUBLE NOT NULL,
    since DOUBLE NOT NULL,
    PRIMARY KEY (rollout_id, device_id)
);
CREATE INDEX IF NOT EXISTS ix_assignment_device_id ON assignment (device_id);
CREATE INDEX IF NOT EXISTS ix_assignment_waiting ON assignment (state) WHERE state = 'waiting';
CREATE TABLE IF NOT EXISTS refused_bundle (
    device_id INTEGER NOT NULL REFERENCES device (id),
    bundle VARCHAR NOT NULL,
    target VARCHAR NOT NULL,
    stage VARCHAR NOT NULL,
    reason VARCHAR NOT NULL,
    at DOUBLE NOT NULL,
    PRIMARY KEY (device_id, bundle)
);
CREATE INDEX IF NOT EXISTS ix_refused_bundle_bundle ON refused_bundle (bundle);
CREATE INDEX IF NOT EXISTS ix_latency_bundle ON latency (bundle);
CREATE TABLE IF NOT EXISTS transfer (
    device_id INTEGER NOT NULL REFERENCES device (id),
    digest VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    served BLOB NOT NULL,
    have BLOB NOT NULL,
    blocks_served INTEGER NOT NULL,
    finished_served_again INTEGER NOT NULL,
    bytes_served INTEGER NOT NULL,
    PRIMARY KEY (device_id, digest, kind)
);
CREATE TABLE IF NOT EXISTS command (
    cid VARCHAR NOT NULL PRIMARY KEY,
    device_id INTEGER NOT NULL REFERENCES device (id),
    verb VARCHAR NOT NULL,
    asked_at DOUBLE NOT NULL,
    sent_at DOUBLE,
    answered_at DOUBLE,
    ok BOOLEAN,
    detail VARCHAR
);
CREATE TABLE IF NOT EXISTS audit (
    id INTEGER NOT NULL PRIMARY KEY,
    at DOUBLE NOT NULL,
    actor VARCHAR NOT NULL,
    action VARCHAR NOT NULL,
    subject VARCHAR NOT NULL,
    evidence VARCHAR NOT NULL,
    hash VARCHAR NOT NULL
);
CREATE INDEX IF NOT EXISTS ix_audit_subject ON audit (subject);
CREATE TABLE IF NOT EXISTS rollout_stage (
    rollout_id INTEGER NOT NULL PRIMARY KEY REFERENCES rollout (id),
    policy VARCHAR NOT NULL,
    phase VARCHAR NOT NULL,
    paused BOOLEAN NOT NULL,
    wave INTEGER NOT NULL,
    waves INTEGER NOT NULL,
    since DOUBLE NOT NULL,
    reason VARCHAR NOT NULL,
    approved INTEGER NOT NULL,
    revert_id INTEGER REFERENCES rollout (id),
    live INTEGER NOT NULL,
    edition INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS ix_rollout_stage_live ON rollout_stage (live);
CREATE TABLE IF NOT EXISTS rollout_member (
    rollout_id INTEGER NOT NULL REFERENCES rollout (id),
    device_id INTEGER NOT NULL REFERENCES device (id),
    target VARCHAR NOT NULL,
    wave INTEGER NOT NULL,
    step VARCHAR NOT NULL,
    told_at DOUBLE NOT NULL,
    moved_at DOUBLE NOT NULL,
    mark VARCHAR NOT NULL,
    tries INTEGER NOT NULL,
    stage VARCHAR NOT NULL,
    PRIMARY KEY (rollout_id, device_id)
);
CREATE INDEX IF NOT EXISTS ix_rollout_member_device_id ON rollout_member (device_id);
CREATE TABLE IF NOT EXISTS gate_result (
    rollout_id INTEGER NOT NULL REFERENCES rollout (id),
    wave INTEGER NOT NULL,
    gate VARCHAR NOT NULL,
    target VARCHAR NOT NULL,
    verdict VARCHAR NOT NULL,
    figure DOUBLE,
    "limit" DOUBLE NOT NULL,
    low DOUBLE,
    high DOUBLE,
    samples INTEGER NOT NULL,
    detail VARCHAR NOT NULL,
    at DOUBLE NOT NULL,
    PRIMARY KEY (rollout_id, wave, gate, target)
);
"""

TRIGGERS = (
    """
    CREATE TRIGGER IF NOT EXISTS audit_is_not_changed BEFORE UPDATE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
    """,
    """
    CREATE TRIGGER IF NOT EXISTS audit_is_not_shortened BEFORE DELETE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
    """,
)
"""Statements of their own, since they contain semicolons."""

NEW_COLUMNS: dict[int, str] = {
    3: """
ALTER TABLE device_state ADD COLUMN told_target VARCHAR;
ALTER TABLE device_state ADD COLUMN refused_version INTEGER;
ALTER TABLE device_state ADD COLUMN refused_reason VARCHAR;
ALTER TABLE device_state ADD COLUMN refused_came VARCHAR;
ALTER TABLE device_state ADD COLUMN refused_held VARCHAR;
ALTER TABLE device_state ADD COLUMN namesake VARCHAR;
ALTER TABLE rollout_device ADD COLUMN superseded_by INTEGER REFERENCES rollout (id);
""",
    4: """
ALTER TABLE release ADD COLUMN statement BLOB;
""",
    5: """
ALTER TABLE desired_model ADD COLUMN soak DOUBLE NOT NULL DEFAULT 0;
ALTER TABLE bundle ADD COLUMN drift VARCHAR;
ALTER TABLE reported_model ADD COLUMN served_calls INTEGER;
ALTER TABLE reported_model ADD COLUMN served_golden INTEGER;
ALTER TABLE reported_model ADD COLUMN served_problem VARCHAR;
""",
    6: """
ALTER TABLE desired_model ADD COLUMN rival VARCHAR;
ALTER TABLE desired_model ADD COLUMN rival_size INTEGER NOT NULL DEFAULT 0;
""",
    7: """
ALTER TABLE desired_model ADD COLUMN ordered INTEGER NOT NULL DEFAULT 0;
""",
}
"""Columns that a version adds to tables of the versions before it."""

SET_ASIDE = """
CREATE TEMPORARY TABLE old_bundle AS SELECT id, release_id, target, digest, size, backend, precision, drift FROM bundle;
CREATE TEMPORARY TABLE old_bundle_blob AS SELECT bundle_id, digest FROM bundle_blob;
DROP TABLE bundle_blob;
DROP TABLE bundle;
"""
PUT_BACK = """
INSERT INTO bundle (id, release_id, target, digest, size, backend, precision, drift) SELECT * FROM old_bundle;
INSERT INTO bundle_blob SELECT * FROM old_bundle_blob;
DROP TABLE old_bundle;
DROP TABLE old_bundle_blob;
"""
"""A table before version 6 held one bundle of each target, which SQLite cannot take back without making it anew."""

SUPERSEDE = """
UPDATE rollout_device SET superseded_by = (
    SELECT min(later.rollout_id) FROM rollout_device AS later
    JOIN rollout AS newer ON newer.id = later.rollout_id
    WHERE later.device_id = rollout_device.device_id AND later.rollout_id > rollout_device.rollout_id
      AND newer.model = (SELECT model FROM rollout WHERE id = rollout_device.rollout_id)
);
UPDATE rollout SET state = CASE WHEN EXISTS (
    SELECT 1 FROM rollout_device AS part WHERE part.rollout_id = rollout.id AND part.superseded_by IS NULL
) THEN 'active' ELSE 'superseded' END;
"""
"""What older versions knew of a rollout as a whole, told of each of its devices."""

SET_FIGURES_ASIDE = "ALTER TABLE call_figures RENAME TO old_figures"
PUT_FIGURES_BACK = """
INSERT INTO call_figures SELECT device_id, model, digest, since, until, 0,
    json_extract(CAST(document AS TEXT), '$.shadow.digest'), document FROM old_figures;
DROP TABLE old_figures;
"""
"""Before version 8 only the document told of a shadow, and the rows were too large for a table without row numbers."""

PER_DEVICE = (
    "assignment",
    "refused_bundle",
    "telemetry",
    "call_figures",
    "drift_sketch",
    "sample_part",
    "desired_shadow",
    "transfer",
    "rollout_device",
    "rollout_member",
    "latency",
    "desired_model",
    "reported_model",
    "device_state",
    "command",
)
"""Tables whose rows are deleted with their device."""
