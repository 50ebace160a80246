package repo

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

// lockCache remembers what this machine has read back of locks: of objects by
// their names, and of whole disk maps (rootKey). A lock never gets shorter, so
// what it says stays true; its loss costs only that locks are asked for again.
//
// The file: "HFLK", per lock the first 16 bytes of the SHA-256 of what is
// locked, and Unix seconds times 4 plus the mode (8), CRC-32C of all before (4).
type lockCache struct {
	path string

	mu    sync.Mutex // guards what follows
	locks map[lockKey]blob.Lock
	dirty bool // there is something that the file does not have
}

type lockKey [16]byte

func keyOf(what string) lockKey {
	sum := sha256.Sum256([]byte(what))
	return lockKey(sum[:16])
}

const locksMagic = "HFLK"

// locksIn reads the memory in a repository's cache. One that is damaged is as
// good as none.
func locksIn(cache string) *lockCache {
	path := filepath.Join(cache, "locks")
	return &lockCache{path: path, locks: readLocks(path)}
}

func readLocks(path string) map[lockKey]blob.Lock {
	locks := map[lockKey]blob.Lock{}
	p, err := os.ReadFile(path)
	if err != nil || len(p) < 8 || (len(p)-8)%24 != 0 || string(p[:4]) != locksMagic {
		return locks
	}
	body := p[:len(p)-4]
	if seal.Checksum(body) != binary.LittleEndian.Uint32(p[len(body):]) {
		return locks
	}
	for b := body[4:]; len(b) > 0; b = b[24:] {
		n := int64(binary.LittleEndian.Uint64(b[16:]))
		locks[lockKey(b[:16])] = blob.Lock{Until: time.Unix(n>>2, 0).UTC(), Mode: blob.LockMode(n & 3)}
	}
	return locks
}

func (c *lockCache) get(what string) blob.Lock {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.locks[keyOf(what)]
}

func (c *lockCache) holds(what string, l blob.Lock) bool { return c.get(what).Holds(l) }

// set notes what was read; no lock forgets.
func (c *lockCache) set(what string, l blob.Lock) {
	k := keyOf(what)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.locks[k] == l {
		return
	}
	c.locks[k], c.dirty = l, true
}

// save writes what is new, together with what other processes have noted. What
// one of them notes at the same time may get lost.
func (c *lockCache) save(now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.dirty {
		return nil
	}
	all := readLocks(c.path)
	maps.Copy(all, c.locks)
	maps.DeleteFunc(all, func(_ lockKey, l blob.Lock) bool { return l.Until.Before(now) })
	p := append(make([]byte, 0, 8+24*len(all)), locksMagic...)
	for k, l := range all {
		p = binary.LittleEndian.AppendUint64(append(p, k[:]...), uint64(l.Until.Unix()<<2|int64(l.Mode&3)))
	}
	p = binary.LittleEndian.AppendUint32(p, seal.Checksum(p))
	if err := os.MkdirAll(filepath.Dir(c.path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(c.path), "locks-*")
	if err != nil {
		return err
	}
	_, err = f.Write(p)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), c.path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	c.locks, c.dirty = all, false
	return nil
}
