package nbd

import (
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// BenchmarkRead reads with our client from our server, 16 requests at a time,
// over a Unix socket, from a raw file in the page cache.
func BenchmarkRead(b *testing.B) {
	const size = 256 << 20
	f, err := disk.CreateFile(filepath.Join(b.TempDir(), "f"), size)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	p, rnd := make([]byte, 1<<20), disktest.Rand(b)
	for off := int64(0); off < size; off += int64(len(p)) {
		disktest.Fill(rnd, p)
		if err := f.WriteAt(b.Context(), p, off); err != nil {
			b.Fatal(err)
		}
	}
	keys := makePKI(b)
	for _, secure := range []bool{false, true} {
		for _, n := range []int64{4 << 10, 64 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("tls=%v/%dKiB", secure, n>>10), func(b *testing.B) {
				var so ServerOptions
				var do DialOptions
				if secure {
					so.TLS, do.TLS = keys.server, keys.client
					do.TLS.ServerName = "localhost"
				}
				r := serve(b, shelf{"d": f}, so, "unix")
				c := dialTest(b, r.at("d"), do)
				defer c.Close()
				b.SetBytes(n)
				var next atomic.Int64
				var wg sync.WaitGroup
				for range 16 {
					wg.Go(func() {
						p := make([]byte, n)
						for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
							if err := c.ReadAt(b.Context(), p, i*7919*n%size); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
			})
		}
	}
}
