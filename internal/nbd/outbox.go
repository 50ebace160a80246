package nbd

import (
	"net"
	"sync"
	"time"
)

// outbox sends messages over a connection in the order in which they were
// given. There is no sender goroutine: whoever finds the outbox idle sends,
// and goes on while others add to it. So one request at a time costs one
// write and no hand-over, and many at once share writes.
type outbox struct {
	nc    net.Conn
	vec   bool          // nc has writev
	stall time.Duration // longest time one write may take
	sent  func(*buffer) // gives back a message, sent or not
	fail  func(error)   // told of the first error

	mu    sync.Mutex // guards what follows
	queue []*buffer
	spare []*buffer
	busy  bool
	err   error

	bufs net.Buffers // scratch of the goroutine that sends
}

// send takes b. It may return before b is sent. After an error it gives b
// back unsent.
func (o *outbox) send(b *buffer) {
	o.add(b)
	o.flush()
}

// add takes b, to be sent with the next send or flush, or before.
func (o *outbox) add(b *buffer) {
	o.mu.Lock()
	o.queue = append(o.queue, b)
	o.mu.Unlock()
}

// flush sends what was added, unless somebody is at it.
func (o *outbox) flush() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.busy {
		return
	}
	o.busy = true
	for len(o.queue) > 0 {
		batch, err := o.queue, o.err
		o.queue, o.spare = o.spare[:0], nil
		o.mu.Unlock()
		if err == nil {
			if err = o.write(batch); err != nil {
				o.fail(err)
			}
		}
		for i, b := range batch {
			o.sent(b)
			batch[i] = nil
		}
		o.mu.Lock()
		o.spare, o.err = batch, err
	}
	o.busy = false
}

func (o *outbox) write(batch []*buffer) error {
	if err := o.nc.SetWriteDeadline(time.Now().Add(o.stall)); err != nil {
		return err
	}
	if len(batch) == 1 || !o.vec {
		for _, b := range batch {
			if _, err := o.nc.Write(b.bytes()); err != nil {
				return err
			}
		}
		return nil
	}
	o.bufs = o.bufs[:0]
	for _, b := range batch {
		o.bufs = append(o.bufs, b.bytes())
	}
	bufs := o.bufs // WriteTo eats the slice that it is called on
	_, err := bufs.WriteTo(o.nc)
	return err
}
