package chain

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"holdfast/internal/repo/internal/seal"
)

// ErrRolledBack: the store does not contain what this machine saw in it.
var ErrRolledBack = errors.New("the repository is older than this machine has seen it")

// headSeen is the newest chain entry that this machine has seen.
type headSeen struct {
	Number uint64   `json:"number"`
	Digest seal.Hex `json:"digest"`
}

func (c *Chain) seen() (h headSeen, err error) {
	p, err := os.ReadFile(c.Memory)
	if errors.Is(err, os.ErrNotExist) {
		return h, nil
	} else if err != nil {
		return h, err
	}
	if err := json.Unmarshal(p, &h); err != nil {
		return h, fmt.Errorf("%s: %w; delete it to go on without the detection of a rollback", c.Memory, err)
	}
	return h, nil
}

func (c *Chain) rolledBack(seen headSeen) error {
	return fmt.Errorf("%w: entry %d of its chain is missing or another one; if you put back an older copy yourself, delete %s",
		ErrRolledBack, seen.Number, c.Memory)
}

// Remember keeps the head of a state for the next Read. A crash here costs only
// that.
func (c *Chain) Remember(s *State) error {
	if s.Head == 0 || s.unknown {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(c.Memory), 0o700); err != nil {
		return err
	}
	p, err := json.Marshal(headSeen{s.Head, s.Digest[:]})
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(c.Memory), "head-*")
	if err != nil {
		return err
	}
	_, err = f.Write(p)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), c.Memory)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
