// Package layers holds the import policy of the whole program, as a test.
//
//	6  cmd
//	5  server  proxy
//	4  node                                               sees both sides
//	3  backup  recovery ◀ lab  replica  guestfs  job   │
//	2  repo  publish  state                            │  hypervisor/{libvirt,hyperv,vsphere,folder}
//	1  mover  overlay  hypervisor  retention           │  nbd  nfs  iscsi  image/*  blob/s3
//	0  disk  blob                                      │
//	   osfile
//
// Imports run downward, from a level to lower ones. The left side, the core,
// never imports the right, where the vendors and protocols are: it gets
// their functions from node. The right imports what is lower on either side,
// and image/* anywhere. What stands above node reaches the right through it.
//
// Packages for tests (disktest, blobtest and their like) are imported by tests
// and by one another. A package that is not in the table fails the test: to
// add it there is to decide where it belongs.
package layers
