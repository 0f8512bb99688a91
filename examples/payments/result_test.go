package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
)

// exact is a result with n orders in which nothing is wrong: one message is twice
// on the wire, and the naive consumer charged twice for it.
func exact(n int) *result {
	r := &result{
		orders: map[uuid.UUID]int64{}, wire: map[string][]Order{},
		ledger: map[uuid.UUID][]int64{}, naive: map[uuid.UUID][]int64{}, receipts: map[uuid.UUID][]receipt{},
		declined: []Order{{ID: number(1000), Amount: creditLimit + 1}},
	}
	for i := range n {
		order := Order{ID: number(i), Amount: int64(100 + i)}
		r.orders[order.ID] = order.Amount
		r.wire[fmt.Sprint("message ", i)] = []Order{order}
		r.ledger[order.ID] = []int64{order.Amount}
		r.naive[order.ID] = []int64{order.Amount}
		r.receipts[order.ID] = []receipt{{order.ID, order.Amount, traceOf(order.ID)}}
	}
	first := Order{ID: number(0), Amount: 100}
	r.wire["message 0"] = append(r.wire["message 0"], first)
	r.naive[first.ID] = append(r.naive[first.ID], first.Amount)
	return r
}

func number(n int) (id uuid.UUID) {
	id[14], id[15] = byte(n>>8), byte(n)
	return id
}

func TestVerdictSeesEveryBreach(t *testing.T) {
	if err := exact(5).verdict(5); err != nil {
		t.Fatalf("an exact result is refused: %s", err)
	}
	id := number(3)
	for want, breach := range map[string]func(*result){
		"1 orders accepted but not in the database":         func(r *result) { drop(r, id) },
		"1 messages left in the outbox":                     func(r *result) { r.waiting = 1 },
		"1 orders never published":                          func(r *result) { delete(r.wire, "message 3") },
		"1 orders without a charge":                         func(r *result) { delete(r.ledger, id) },
		"1 double charges":                                  func(r *result) { r.ledger[id] = append(r.ledger[id], 103) },
		"1 charges of a wrong amount":                       func(r *result) { r.ledger[id] = []int64{104} },
		"1 orders without exactly one receipt":              func(r *result) { r.receipts[id] = append(r.receipts[id], r.receipts[id][0]) },
		"1 receipts without the trace of their order":       func(r *result) { r.receipts[id][0].Trace = traceOf(number(4)) },
		"1 charges without an order":                        func(r *result) { r.ledger[number(1000)] = []int64{1} },
		"1 messages on the wire that no transaction commit": func(r *result) { r.wire["ghost"] = r.declined },
		// Two messages about one order are two commits, or an ID that is not stable.
		"1 messages on the wire that no transaction": func(r *result) { r.wire["again"] = r.wire["message 3"] },
		"double charges": func(r *result) { r.ledger = r.naive },
	} {
		t.Run(want, func(t *testing.T) {
			r := exact(5)
			breach(r)
			if err := r.verdict(5); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("want %q, got %v", want, err)
			}
		})
	}
}

// drop makes an accepted order one that never was.
func drop(r *result, id uuid.UUID) {
	delete(r.orders, id)
	delete(r.ledger, id)
	delete(r.wire, "message 3")
}

func TestTableCounts(t *testing.T) {
	table := exact(5).table(&faults{killed: 5, closed: 2, restarted: 1}, 1500*time.Millisecond)
	got := strings.Join(strings.Fields(table), " ")
	want := "orders committed 5 orders rolled back 1 messages on the wire 6 duplicates on the wire 1 0 of them by hand " +
		"naive consumer: charges 6 naive consumer: double charges 1 ledger with inbox: charges 5 ledger with inbox: double charges 0 " +
		"orders without a charge 0 receipts 5 relay killed, connections closed, broker restarted 5, 2, 1 time 1.5 s"
	if got != want {
		t.Errorf("\n got %s\nwant %s", got, want)
	}
}
