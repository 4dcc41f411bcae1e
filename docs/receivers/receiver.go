// A receiver of AcousticSense's webhooks.
//
//	WEBHOOK_SECRET=whsec_... PORT=3000 go run .
//
// What it remembers, it remembers in memory. In earnest that is a table of a database, written in one transaction with
// what an event changes.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
)

const (
	mostBytes  = 64 << 10           // every event is smaller than 20 kB
	remembered = 7 * 24 * time.Hour // longer than an event is tried
)

type event struct {
	Type string `json:"type"`
	Data struct {
		Challenge string  `json:"challenge"` // of endpoint.verification
		Ref       *string `json:"ref"`       // null where a job has none
		Revision  int64   `json:"revision"`
		State     string  `json:"state"`
		Genres    []struct {
			Label string `json:"label"`
		} `json:"genres"`
	} `json:"data"`
}

type result struct {
	revision     int64
	state, genre string
}

type receiver struct {
	webhook *standardwebhooks.Webhook
	mutex   sync.Mutex
	seen    map[string]time.Time // webhook-id: when it came
	latest  map[string]result    // ref: the latest result
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, request.Body, mostBytes))
	if err != nil {
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		return
	}
	// What was signed is these very bytes: verify first, parse then. The reason of a refusal is shown with the attempt to
	// whoever registered the endpoint.
	if err := r.webhook.Verify(body, request.Header); err != nil {
		http.Error(w, err.Error(), http.StatusUnauthorized)
		return
	}
	var told event
	if err := json.Unmarshal(body, &told); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if told.Type == "endpoint.verification" {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]string{"challenge": told.Data.Challenge})
		return
	}
	id := request.Header.Get(standardwebhooks.HeaderWebhookID)
	isNew := r.remember(id)
	// First remembered, then answered, then worked on: the sender waits 15 s, and what was answered never comes again.
	w.WriteHeader(http.StatusNoContent)
	if !isNew {
		fmt.Println(id, told.Type, "known")
		return
	}
	go func() { fmt.Println(id, told.Type, r.work(id, told)) }()
}

func (r *receiver) remember(id string) bool {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if _, known := r.seen[id]; known {
		return false
	}
	r.seen[id] = time.Now()
	return true
}

func (r *receiver) forget() {
	for range time.Tick(time.Hour) {
		r.mutex.Lock()
		for id, at := range r.seen {
			if time.Since(at) > remembered {
				delete(r.seen, id)
			}
		}
		r.mutex.Unlock()
	}
}

func (r *receiver) work(id string, told event) string {
	if strings.HasPrefix(id, "evt_test_") {
		return "test"
	}
	data := told.Data
	if (told.Type != "job.completed" && told.Type != "job.failed") || data.Ref == nil {
		return "noted"
	}
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if known, ok := r.latest[*data.Ref]; ok && known.revision > data.Revision {
		return "outdated"
	}
	found := result{revision: data.Revision, state: data.State}
	if len(data.Genres) > 0 {
		found.genre = data.Genres[0].Label
	}
	r.latest[*data.Ref] = found
	return "latest"
}

func main() {
	webhook, err := standardwebhooks.NewWebhook(os.Getenv("WEBHOOK_SECRET"))
	if err != nil || os.Getenv("WEBHOOK_SECRET") == "" {
		log.Fatal("WEBHOOK_SECRET is not a secret: it begins with whsec_ and was shown when the endpoint was registered")
	}
	port := os.Getenv("PORT")
	if port == "" {
		port = "3000"
	}
	listener, err := net.Listen("tcp", "127.0.0.1:"+port)
	if err != nil {
		log.Fatal(err)
	}
	r := &receiver{webhook: webhook, seen: map[string]time.Time{}, latest: map[string]result{}}
	go r.forget()
	fmt.Printf("Listening on http://%s\n", listener.Addr())
	server := http.Server{Handler: r, ReadTimeout: 15 * time.Second}
	log.Fatal(server.Serve(listener))
}
