// Package libvirt backs up and recovers QEMU/KVM guests through a libvirt
// daemon, spoken to over its RPC protocol. Host is a connection; it is a
// hypervisor.Source and a hypervisor.Target.
//
// # A snapshot
//
// of a running guest is a pull-mode backup job (libvirt, "Backup XML format"):
//
//	ask the agent ─ guard ─ freeze ─ DomainBackupBegin + checkpoint ─ thaw ─ read over NBD ─ abort the job
//
// From the job's beginning QEMU serves every disk as it was at that instant
// and copies what the guest overwrites into scratch files first. The
// checkpoint makes a dirty bitmap in every qcow2 disk: it is the reference
// point, and the next job exports what became dirty since as the NBD context
// qemu:dirty-bitmap. Raw disks have no place for a bitmap and are read whole.
// Everything is named after the Owner: checkpoint, bitmaps, socket, scratch
// files; by those names Clean finds what a dead session left, and nothing else
// is ever touched.
//
// A stopped guest is read in the same way: a QEMU with its disks and no other
// device is started, its processor paused for good, as the live configuration
// of the same domain (VIR_DOMAIN_START_PAUSED and AUTODESTROY, so that libvirt
// ends it when our connection ends). The persistent definition is not changed,
// no firmware runs, no NVRAM is made. Its metadata marks it as ours (shell.go).
//
// # The freeze
//
// never outlives its limit. It is thawed at once after DomainBackupBegin, also
// on errors and when the context ends; by a timer of this process at the
// limit; and by a process of its own (Options.Guard, Thaw) when this one is
// dead. Levels are never downgraded: filesystem needs an agent that froze
// something; application needs VSS (Windows, always part of the agent's
// freeze) or, on Linux, an agent that says through its /proc/self/cmdline or
// configuration that it runs a freeze hook, and the hook there.
//
// # When tracking is lost
//
// each disk says so for itself (hypervisor.ErrNoReference) and is read whole:
// a checkpoint that is gone or foreign, a bitmap that is missing or
// inconsistent (QEMU was killed), a disk that is new. When libvirt refuses a
// job the job is tried again without the reference, then without a checkpoint.
//
// # Traps
//
//   - QEMU 7.2 dies, and the guest with it, when its block nodes are queried
//     (virsh domblkinfo, domstats) while a blockdev-create job runs; libvirt
//     runs one for each scratch file. So the scratch files are made by us
//     (VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL). Tried: dead within 14 jobs
//     under a loop of queries, alive after 60 with our files.
//   - An agent bars nearly all its commands while filesystems are frozen, so
//     everything is asked before. libvirt precedes each command by a
//     guest-sync: a hung agent is noticed before the freeze is sent. One that
//     hangs after it was sent carries it out later; so a thaw is repeated
//     until the agent says "thawed".
//   - libvirt aborts whatever job is active: before aborting it is looked at
//     by name.
//   - libvirt deletes bitmaps through QEMU only, so the checkpoint of a stopped
//     guest is deleted with a paused QEMU; one whose bitmap is broken is
//     deleted by its metadata, and the bitmaps through QEMU's monitor.
//   - QEMU stores bitmaps when it closes an image: a paused QEMU is ended with
//     VIR_DOMAIN_DESTROY_GRACEFUL (SIGTERM alone).
//   - A qcow2 file of version 2 ("compat 0.10") takes no bitmap, and libvirt
//     refuses the whole job: such disks are found beforehand.
//   - libvirt wants a port for a job served over TCP and does not choose one.
//   - libvirtd examines its QEMU anew, for seconds and dozens of times, at each
//     DomainCreateXML when root may use /dev/kvm and QEMU's user may not.
//   - The RPC library's Disconnect waits for the daemon's answer, and its event
//     streams can deadlock: the socket is closed instead, and states are
//     polled.
//
// # In parallel
//
// Methods of Host may run side by side, but for two snapshots, or a snapshot
// and Clean, of one VM; that is for the caller's locks. An RPC cannot be
// withdrawn: calls that change something run to their end (bounded by
// closeLimit) when the caller's context ends, and are then undone.
package libvirt
