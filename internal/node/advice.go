package node

import (
	"errors"
	"io/fs"
	"strings"
	"syscall"

	"holdfast/internal/blob"
	"holdfast/internal/blob/harden"
	"holdfast/internal/hypervisor"
	"holdfast/internal/hypervisor/libvirt"
	"holdfast/internal/overlay"
	"holdfast/internal/repo"
	"holdfast/internal/state"
)

// advice says what to do about errors, the most telling first. An error that
// says so itself, with the words in unless, gets none.
var advice = []struct {
	err    error
	unless string
	say    string
}{
	{repo.ErrHidden, "", "\"holdfast check\" brings it back"},
	{repo.ErrNoRule, "", "docs/admin.md says under Immutability what a store needs"},
	{blob.ErrNoLock, "", "docs/admin.md says under Immutability what a store needs; \"holdfast repo immutable off\" ends the rule"},
	{repo.ErrLockMode, "", "stay with governance, or make a new repository with compliance and copy to it"},
	{repo.ErrPassphrase, "or type it again", "check HOLDFAST_PASSPHRASE or HOLDFAST_PASSPHRASE_FILE, or type it again"},
	{repo.ErrKeys, "put it back", "run it again with a passphrase that is valid now"},
	{repo.ErrSlotInUse, "", "say --own to remove it all the same, or open the repository with another one"},
	{repo.ErrLastSlot, "", "add another one first: \"holdfast key add\""},
	{repo.ErrNoSlot, "", "\"holdfast key list\" shows what there is"},
	{repo.ErrKeyFile, "", "use another copy of the file that \"holdfast key export\" wrote"},
	{repo.ErrNotRepository, "; check --", "check --repo or HOLDFAST_REPO, or make one there with \"holdfast init\""},
	{repo.ErrExist, "", "use it as it is, or choose another directory"},
	{repo.ErrVersion, "", "use the newer Holdfast that wrote it"},
	{repo.ErrNoTier, "", "\"holdfast tier list\" shows what there is"},
	{repo.ErrTierExists, "", "choose another name or place"},
	{blob.ErrUnreachable, "see to that", "see that it is mounted and answers; if its place has changed, \"holdfast tier add\" with its name and the new place"},
	{repo.ErrBusy, "", "wait for it to end, or if it has died, add --wait, which finds out and ends it"},
	{repo.ErrRolledBack, "is lost, delete", "put the newer state back, or find out who restored an old copy; nothing was changed"},
	{repo.ErrRevoked, "", "run it again"},
	{repo.ErrLeftBehind, "", "run it again; nothing was lost"},
	{repo.ErrDamaged, "put ", "\"holdfast check --read-data\" lists what is damaged; other restore points may be whole"},
	{harden.ErrNotHardened, "", "prepare it with \"holdfast harden DIR --user USER\", where USER is who writes the repository"},
	{harden.ErrNotStore, "", "make the repository first, as the user who writes it"},
	{harden.ErrRuns, "", "see \"systemctl status\" and \"pgrep -a holdfast\""},
	{harden.ErrNotRoot, "run it as root", "run it as root of the machine that has the filesystem"},
	{state.ErrVersion, "", "use the newer Holdfast that wrote it"},
	{state.ErrDamaged, "", "move the file away if the session is not needed any more"},
	{state.ErrAmbiguous, "", "give more digits"},
	{state.ErrNotExist, "", "\"holdfast sessions\" lists what there is"},
	{state.ErrLocked, "", "wait for it to end, or end it"},
	{overlay.ErrLocked, "", "\"holdfast sessions\" shows what uses it"},
	{overlay.ErrOtherBase, "", "name an empty directory with --overlay"},
	{overlay.ErrVersion, "", "use the newer Holdfast that wrote it"},
	{hypervisor.ErrExist, "--", "choose another name with --name, or remove what has it"},
	{libvirt.ErrLost, "", "see that libvirtd runs and answers, then run the command again"},
	{libvirt.ErrAgent, "--consistency", "see that the guest agent runs in the guest, or use --consistency crash"},
	{syscall.ENOSPC, "", "make room there, then run the command again"},
	{syscall.EDQUOT, "", "the quota is used up: make room there, then run the command again"},
	{syscall.ECONNREFUSED, "", "see that the daemon runs there"},
	{syscall.EROFS, "", "it is mounted read-only"},
	{fs.ErrPermission, "", "run this as a user who may (root, or the group that owns it)"},
}

// Advice says what to do about an error, or "".
func Advice(err error) string {
	for _, a := range advice {
		if errors.Is(err, a.err) {
			if a.unless != "" && strings.Contains(err.Error(), a.unless) {
				return ""
			}
			return a.say
		}
	}
	return ""
}
