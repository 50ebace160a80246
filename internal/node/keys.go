package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"holdfast/internal/repo"
)

// Keys are what opens a repository.
type Keys struct {
	Repository string `json:"repository"` // id
	repo.Keyring
	Slots []repo.Slot `json:"keys"`
}

// Keys lists what opens the repository.
func (n *Node) Keys(ctx context.Context) (Keys, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return Keys{}, err
	}
	slots, err := r.Slots(ctx)
	return Keys{r.ID(), r.Keyring(), slots}, err
}

// AddKey adds the passphrase that ask gives, when the repository is open.
func (n *Node) AddKey(ctx context.Context, label string, ask func(context.Context) ([]byte, error)) (repo.Slot, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return repo.Slot{}, err
	}
	p, err := ask(ctx)
	if err != nil {
		return repo.Slot{}, err
	}
	slot, err := r.AddPassphrase(ctx, label, p)
	if err != nil {
		return slot, fmt.Errorf("add a passphrase: %w", err)
	}
	return slot, nil
}

// RecoverySheet is a recovery key with what its print-out must say beside it:
// which repository it opens, where that is, and how far its chain was, so that
// an older copy of the repository can be told from this one.
type RecoverySheet struct {
	repo.Slot
	Key        string    `json:"recovery_key"`
	Repository string    `json:"repository"`
	Location   string    `json:"location"`
	Entry      uint64    `json:"chain_entry"`
	EntryTime  time.Time `json:"chain_time"`
}

// AddRecovery makes a recovery key.
func (n *Node) AddRecovery(ctx context.Context, label string) (s RecoverySheet, err error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return s, err
	}
	head, err := r.Head(ctx)
	if err != nil {
		return s, err
	}
	s.Repository, s.Entry, s.EntryTime = r.ID(), head.Number, head.Time
	if s.Location, err = n.Location(); err != nil {
		return s, err
	}
	if s.Slot, s.Key, err = r.AddRecovery(ctx, label); err != nil {
		return s, fmt.Errorf("add a recovery key: %w", err)
	}
	return s, nil
}

// RemoveKeyRequest names a key to remove.
type RemoveKeyRequest struct {
	Key    string // id, the beginning of one, or a label
	Own    bool   // even when it is the one that opened the repository
	DryRun bool
}

// RemoveKey removes a key, or with DryRun says which one it would be.
func (n *Node) RemoveKey(ctx context.Context, q RemoveKeyRequest) (repo.Slot, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return repo.Slot{}, err
	}
	slots, err := r.Slots(ctx)
	if err != nil {
		return repo.Slot{}, err
	}
	slot, err := chooseKey(slots, q.Key)
	if err != nil {
		return slot, err
	}
	inUse := ""
	if q.Own {
		inUse = slot.ID
	}
	if q.DryRun {
		return slot, r.MayRemove(ctx, slot.ID, inUse)
	}
	return slot, r.RemoveSlot(ctx, slot.ID, inUse)
}

// chooseKey finds a slot by its label, its id, or the beginning of one.
func chooseKey(slots []repo.Slot, name string) (repo.Slot, error) {
	var found []repo.Slot
	for _, s := range slots {
		if s.Label == name && name != "" || s.ID == name || len(name) >= 4 && strings.HasPrefix(s.ID, name) {
			found = append(found, s)
		}
	}
	switch len(found) {
	case 0:
		return repo.Slot{}, fmt.Errorf("key %q: %w", name, repo.ErrNoSlot)
	case 1:
		return found[0], nil
	}
	ids := make([]string, len(found))
	for i, s := range found {
		ids[i] = s.ID
	}
	return repo.Slot{}, usage("several keys are meant by %q; choose one by its id: %s", name, strings.Join(ids, ", "))
}

// RotateKeys makes a new master key for new data.
func (n *Node) RotateKeys(ctx context.Context) (repo.Keyring, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return repo.Keyring{}, err
	}
	return r.Rotate(ctx)
}

// RotateRootRequest says what becomes of the other keys.
type RotateRootRequest struct {
	// Ask gives the passphrase or recovery key of another slot, or "" to drop it.
	// nil when nobody can be asked.
	Ask func(context.Context, repo.Slot) ([]byte, error)
	// DropOthers drops all but the one that opened the repository.
	DropOthers bool
	DryRun     bool
}

// RotateRoot makes a new root key. With DryRun it says what would be kept and
// dropped, asking nobody.
func (n *Node) RotateRoot(ctx context.Context, q RotateRootRequest) (repo.RootChange, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return repo.RootChange{}, err
	}
	slots, err := r.Slots(ctx)
	if err != nil {
		return repo.RootChange{}, err
	}
	plan := repo.RootChange{Keyring: r.Keyring()}
	for _, s := range slots {
		switch {
		case s.State != repo.SlotCurrent:
		case s.InUse:
			plan.Kept = append(plan.Kept, s)
		default:
			plan.Dropped = append(plan.Dropped, s)
		}
	}
	switch {
	case q.DryRun:
		return plan, nil
	case len(plan.Dropped) > 0 && !q.DropOthers && q.Ask == nil:
		return plan, usage("%s would open the repository no more: run this on a terminal to type what should go on to, or say --drop-others", keyNames(plan.Dropped))
	}
	var passphrases [][]byte
	for _, s := range plan.Dropped {
		if q.DropOthers {
			break
		}
		p, err := q.Ask(ctx, s)
		if err != nil {
			return plan, err
		}
		if len(p) > 0 {
			passphrases = append(passphrases, p)
		}
	}
	change, err := r.RotateRoot(ctx, passphrases)
	if errors.Is(err, repo.ErrPassphrase) {
		return change, fmt.Errorf("%w; nothing was changed", err)
	}
	return change, err
}

func keyNames(slots []repo.Slot) string {
	names := make([]string, len(slots))
	for i, s := range slots {
		if names[i] = s.ID[:8]; s.Label != "" {
			names[i] = s.Label
		}
	}
	return strings.Join(names, ", ")
}

// ExportKeys gives the content of a key file.
func (n *Node) ExportKeys(ctx context.Context) ([]byte, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	return r.ExportKeys(ctx)
}

// ImportKeys puts back what a key file has and the repository lacks, and then
// opens it, to see that it does and to remove again what was removed since.
func (n *Node) ImportKeys(ctx context.Context, file string, dryRun bool) (done repo.KeyImport, err error) {
	content, err := readKeyFile(file)
	if err != nil {
		return done, err
	}
	path, err := n.Location()
	if err != nil {
		return done, err
	}
	store, err := n.openStore(ctx, path)
	if err != nil {
		return done, fmt.Errorf("open the repository: %w", err)
	}
	if done, err = repo.ImportKeys(ctx, store, content, dryRun); err != nil || dryRun {
		return done, err
	}
	r, err := n.Repo(ctx)
	if err != nil {
		return done, fmt.Errorf("%s put back, but: %w", objects(len(done.Put)), err)
	}
	if err := r.Tidy(ctx); err != nil {
		n.o.Report.note("warning: %v", err)
	}
	return done, nil
}

func objects(n int) string {
	if n == 1 {
		return "1 object was"
	}
	return fmt.Sprint(n, " objects were")
}

func readKeyFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := io.ReadAll(io.LimitReader(f, repo.MaxKeyFile+1))
	if err != nil {
		return nil, err
	}
	if len(p) > repo.MaxKeyFile {
		return nil, fmt.Errorf("%s: %w: it is too long", path, repo.ErrKeyFile)
	}
	return p, nil
}
