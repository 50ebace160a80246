// Package repo is the repository: restore points, disk maps and chunks on a
// blob.Store, in the format of docs/format.md.
//
// # Pipeline
//
// A Run holds a lease. Its DiskWriters cut what they are given into chunks,
// name each by a keyed hash, and drop those that the index, the base or the
// run itself already has. The rest is compressed, decoded again and compared,
// gathered in a packer in disk order, sealed into packs and stored. Map nodes
// go the same way through a packer of their own. Flush writes the index
// objects; Commit creates the next entry of the chain, and with that the
// restore point. With a rule on immutability, all that the point needs is locked
// in the store and read back before (docs/format.md §6.3).
//
// A DiskReader looks ids up in the map, finds their places in the index, reads
// what lies near each other in a pack with one request, opens and decodes. Feed
// does so for a gibibyte of the disk at once, pack after pack.
//
// # Packages below
//
//	repo            what is done when: runs, reading, prune, check, copy, tiers, locks
//	├ chain         the chain of commits: entries, the state they fold into, checkpoints
//	├ lease         leases, beats and pins: who is under way
//	├ keyring       key slots, keyrings, passphrases and recovery keys
//	├ index         where items lie: the cache of index objects
//	├ tree          disk maps
//	├ pack          items in a stored object
//	├ codec         compression
//	└ seal          the form of stored objects, and cryptography
//
// A lower one imports none above it.
//
// # What may run beside what
//
// All methods of Repo are safe in parallel, and so are several runs of one or
// more processes and machines on one store. The chain orders them.
//
// # Several stores
//
// Repo.store is a blob.Tiers: the own store, and the tiers that the chain tells
// of, which hold packs too. Nothing above it knows where a pack lies but Move,
// which brings packs to a tier or back, and prune, which brings the packs that
// hold what is left of old ones to where these were. A tier has a mirror of
// all but packs and leases, so that it opens as a repository by itself.
//
// # After a crash
//
// A point exists when its chain entry does; the entry is created last, when all
// it needs is durable. What an unfinished run has stored is found by the next
// one as far as it had announced it; the rest is garbage for prune.
//
// # Locks in this package
//
// refreshing (one reader of the chain's news) is taken before mu (the state), the
// lock of keyring.Keys between them. No I/O happens under mu. Run.mu and packer.mu
// are never held together; that of index.Index is taken last.
package repo
