"""The one door to the file system: all that is created, replaced, removed or locked goes through.

The contract, which every command keeps because nothing else in the package opens a file for
writing (a test reads the source):

**What may be replaced.** Without ``replace`` nothing that exists, whenever it came to be there: a
file gets its name by ``link``, a folder by a renaming that refuses, and whoever comes second gets
a ``FileExistsError``. With ``replace`` a regular file, and nothing else; pipes, devices and sockets
are never replaced. Reports are written into them, checkpoints are refused.

**What is followed.** A link that an output's name ends in is resolved first, and what it leads to
is what is replaced; the link stays. Links of other users are refused. A name of an open descriptor
(``/dev/stdout``, ``/dev/fd/3``) is that descriptor. Temporaries, journals, locks and what lies in
a folder that is written are opened without following any link, by descriptors of their folders.

**What is compared with the inputs.** All that would be replaced or removed is compared with all
that is read, by device and inode and by where it really lies, before anything is written
(:mod:`know_cli.files.protected`).

**What gets the name is what was written**: data is written through the descriptor that was locked,
and that inode is what is linked to the name, so that a temporary that somebody removed, replaced
or swapped is an error and never an output.

**The order.** All data, then ``fsync`` of each file, then the removal of what would contradict it
(an old digest), then the name, then ``fsync`` of the folder. In a folder that exists: other files,
weights, removal of what is left of the old model, the index; see
:func:`know_cli.checkpoints.folders.move_folder`.

**What is read is a regular file** (:mod:`know_cli.files.reading`): a pipe or a device hangs
nobody, and nothing is read beyond a bound that the caller names.
"""

from know_cli.files.folders import (
    check_writable,
    free_bytes,
    make_folder,
    new_folder,
    remove_file,
    remove_tree,
    scratch_folder,
    temporary_place,
)
from know_cli.files.jsons import json_text, printable_texts
from know_cli.files.locks import lock
from know_cli.files.names import missing_folder, temporary_name
from know_cli.files.naming import give_name, rename_new
from know_cli.files.own import OwnFile, open_own
from know_cli.files.places import destination, open_descriptor_of
from know_cli.files.reading import (
    check_regular,
    open_file,
    open_to_read,
    read_bytes,
    read_text,
)
from know_cli.files.small import (
    append,
    new_file,
    output_errors,
    sync_folder,
    write_at,
    write_bytes,
    write_text,
)

__all__ = [
    "OwnFile",
    "append",
    "check_regular",
    "check_writable",
    "destination",
    "free_bytes",
    "give_name",
    "json_text",
    "lock",
    "make_folder",
    "missing_folder",
    "new_file",
    "new_folder",
    "open_descriptor_of",
    "open_file",
    "open_own",
    "open_to_read",
    "output_errors",
    "printable_texts",
    "read_bytes",
    "read_text",
    "remove_file",
    "remove_tree",
    "rename_new",
    "scratch_folder",
    "sync_folder",
    "temporary_name",
    "temporary_place",
    "write_at",
    "write_bytes",
    "write_text",
]
