package rabbit

import (
	"bytes"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"
)

func TestWriteToAPeerThatStoppedReadingEnds(t *testing.T) {
	near, far := net.Pipe() // it has no buffer: nobody reads, nobody can write
	defer far.Close()
	c := newGatherConn(near, 20*time.Millisecond)
	result := make(chan error, 1)
	go func() {
		var err error
		for err == nil {
			_, err = c.Write(make([]byte, gatherBytes/4))
		}
		result <- err
	}()
	select {
	case <-result:
	case <-time.After(5 * time.Second):
		t.Fatal("a write has no deadline")
	}
	if _, err := near.Write([]byte("x")); err != io.ErrClosedPipe {
		t.Errorf("the connection is still open: %v", err)
	}
	c.Close()
}

// What several goroutines hand over arrives whole, each one's in order, before the
// connection closes.
func TestWritesArriveInOrderAndBeforeTheEnd(t *testing.T) {
	near, far := net.Pipe()
	c := newGatherConn(near, 5*time.Second)
	const writers, each = 4, 2000
	var writing sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			for i := range each {
				if _, err := c.Write([]byte{byte(w), byte(i), byte(i >> 8)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	go func() { writing.Wait(); c.Close() }()
	var got bytes.Buffer
	if _, err := io.Copy(&got, far); err != nil {
		t.Fatal(err)
	}
	next := make([]int, writers)
	for record := range slices.Chunk(got.Bytes(), 3) {
		w := int(record[0])
		if i := int(record[1]) + int(record[2])<<8; i != next[w] {
			t.Fatalf("writer %d: record %d instead of %d", w, i, next[w])
		}
		next[w]++
	}
	for w, n := range next {
		if n != each {
			t.Errorf("%d records of writer %d", n, w)
		}
	}
}

// A connection that is cut while nothing is written leaves nothing behind.
func TestCutConnectionEndsItsGoroutine(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	c := newGatherConn(near, time.Second)
	c.cut()
	select {
	case <-c.ended:
	case <-time.After(5 * time.Second):
		t.Fatal("it goes on")
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("written after the end")
	}
}
