package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"
)

// body is the payload of a message, and says what is to become of it.
type body struct {
	Key    string    `json:"key"`
	Seq    int64     `json:"seq"`
	At     time.Time `json:"at"`
	Kind   kind      `json:"kind"`
	Canary string    `json:"canary"` // must be in no log
	Filler string    `json:"filler"`
}

// kind is what the handler does with a message.
type kind string

const (
	plain  kind = "plain"
	flaky  kind = "flaky"  // fails once or twice
	sloppy kind = "sloppy" // overlooks an error of the database as often
	poison kind = "poison" // is rejected
)

const (
	messageType = "chaos"
	checkHeader = "chaos-check" // travels with each message, and is hashed with it
)

// hash covers what must arrive as it was sent.
func hash(payload []byte, kind, contentType string, headers map[string]string) int64 {
	h := sha256.New()
	for _, part := range []string{kind, contentType, headers[checkHeader], string(payload)} {
		fmt.Fprintf(h, "%d %s", len(part), part)
	}
	return int64(binary.BigEndian.Uint64(h.Sum(nil)))
}

// parse returns what stands in a payload; nothing if it was changed on the way.
func parse(payload []byte) (b body) {
	if json.Unmarshal(payload, &b) != nil {
		return body{}
	}
	return b
}

// key is NULL for a message without one.
func (b body) key() *string {
	if b.Key == "" {
		return nil
	}
	return &b.Key
}
