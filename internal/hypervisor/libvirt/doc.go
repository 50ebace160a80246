// Package libvirt backs up and recovers QEMU/KVM guests through a libvirt
// daemon, spoken to over its RPC protocol.
package libvirt
