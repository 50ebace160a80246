package blob

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
)

// Mem is a Store in memory. The zero value is empty and ready.
type Mem struct {
	mu      sync.RWMutex
	objects map[string][]byte // guarded by mu; values are never changed
}

// Clone returns an independent store with the same objects, as a copy of the
// directory would be.
func (m *Mem) Clone() *Mem {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return &Mem{objects: maps.Clone(m.objects)}
}

func (m *Mem) Put(ctx context.Context, name string, data []byte) error {
	if err := checkPut(ctx, name, data); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.objects[name]; ok {
		return fmt.Errorf("put %s: %w", name, ErrExist)
	}
	if m.objects == nil {
		m.objects = make(map[string][]byte)
	}
	m.objects[name] = slices.Clone(data)
	return nil
}

func (m *Mem) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.RLock()
	data, ok := m.objects[name]
	m.mu.RUnlock()
	if !ok {
		return nil, fmt.Errorf("get %s: %w", name, ErrNotExist)
	}
	size := int64(len(data))
	if n < 0 {
		n = size - off
	}
	if off < 0 || off > size || n < 0 || n > size-off {
		return nil, fmt.Errorf("get %s [%d, +%d) of %d: %w", name, off, n, size, ErrTruncated)
	}
	return slices.Clone(data[off : off+n]), nil
}

func (m *Mem) List(ctx context.Context, prefix string) iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		var all []Info
		m.mu.RLock()
		for name, data := range m.objects {
			if strings.HasPrefix(name, prefix) {
				all = append(all, Info{name, int64(len(data))})
			}
		}
		m.mu.RUnlock()
		for _, i := range all {
			if err := ctx.Err(); err != nil {
				yield(Info{}, err)
				return
			}
			if !yield(i, nil) {
				return
			}
		}
	}
}

func (m *Mem) Delete(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.objects[name]; !ok {
		return fmt.Errorf("delete %s: %w", name, ErrNotExist)
	}
	delete(m.objects, name)
	return nil
}

// Damage replaces an object's bytes, for tests of what must notice.
func (m *Mem) Damage(name string, change func([]byte) []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.objects[name] = change(slices.Clone(m.objects[name]))
}

func checkPut(ctx context.Context, name string, data []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := CheckName(name); err != nil {
		return err
	}
	if len(data) > MaxSize {
		return fmt.Errorf("put %s: %d bytes are more than an object holds", name, len(data))
	}
	return nil
}
